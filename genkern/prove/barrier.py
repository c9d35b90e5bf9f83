"""Takes a barrier away from a kernel, to see the executor notice it."""

import re
from typing import NamedTuple

from genkern import ptx
from genkern.backend import use_backend
from genkern.ptx import shipped


class Removed(NamedTuple):
    """kernel: mangled. line: of the PTX, where the barrier stood. said: by the executor, or None
    where it noticed nothing."""

    kernel: str
    line: int
    said: str | None


def remove_one(workload):
    """Executes our step of the workload on CUDA without the last barrier of the first kernel in it
    that has one: the first one often waits for what the second would wait for too."""
    step = workload.prepare("genkern")
    removed = {}

    def module_of(kernel):
        if removed and kernel not in removed:
            return shipped.module_of(kernel)
        text, line = without_barrier(shipped.text_of(kernel), kernel)
        if line is None:
            return shipped.module_of(kernel)
        removed[kernel] = line
        return ptx.Module(text)

    said = None
    try:
        with ptx.executing(module_of=module_of), use_backend("cuda"):
            step()
    except ptx.ExecutionError as error:
        said = f"{type(error).__name__}: {error}"
    ((kernel, line),) = removed.items()
    return Removed(kernel, line, said)


def without_barrier(text, kernel):
    """(the PTX without this kernel's last bar.sync, its line there, or None where it has none)"""
    start = re.search(rf"\.entry\s+{kernel}\b", text).start()
    end = text.find("\n}", start)
    found = re.compile(r"^[ \t]*(bar\.sync|barrier\.sync)\b[^\n;]*;", re.MULTILINE)
    barriers = list(found.finditer(text, start, end))
    if not barriers:
        return text, None
    barrier = barriers[-1]
    # The line stays, so that those of the message are those of the file.
    return text[: barrier.start()] + text[barrier.end() :], text.count("\n", 0, barrier.start()) + 1
