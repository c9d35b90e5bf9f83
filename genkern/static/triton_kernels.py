"""Triton's kernels as the ops launch them, compiled for GPUs that are not here, with the numbers of
`cubins.Kernel`."""

import tempfile
from typing import NamedTuple

from genkern import assembly
from genkern.ops import _triton
from genkern.static import calls, kept, sass, tools

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


class Compiled(NamedTuple):
    """One launch of one call for one target."""

    op: str
    name: str  # with the call's dtype and shape
    target: str
    registers: int
    spills: int
    shared_bytes: int
    threads: int
    loop: sass.Loop


def kernels(of_calls, targets, say=lambda text: None):
    """What every launch of the calls becomes; of one kernel in one dtype (attention's: and shape
    of heads) the first."""
    found = {}
    for target in targets:
        say(target)
        for call in of_calls:
            launches, _, _ = calls.step_under(
                "triton", call, lambda target=target: _triton.recording(target)
            )
            for launch in launches:
                name = f"{launch.kernel.__name__} {calls.short_dtype(call.dtype)}{_kind(call)}"
                if (call.op, name, target) not in found:
                    found[call.op, name, target] = _compiled(call.op, name, launch, target)
    return list(found.values())


def _compiled(op, name, launch, target):
    made = assembly.compiled(launch, target)
    read = kept.kept(
        f"triton-{kept.digest(made.binary)}-{kept.reader()}",
        lambda: sass.inner_loop(code_of(made.binary)[made.kernel]).plain(),
    )
    numbers = made.registers, made.spills, made.shared_bytes, made.threads
    return Compiled(op, name, target, *numbers, sass.Loop.of_plain(read))


def code_of(binary):
    """The instructions of a cubin's kernels."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return sass.functions(tools.output([tools.cuobjdump(), "-sass", file.name]))


def _kind(call):
    """What of an attention call's shape its kernels depend on."""
    if call.op != "attention":
        return ""
    sizes, *others = call.shape.split()
    return " ".join(["", f"d={sizes.split('×')[-1]}", *(x for x in others if x.startswith("dv"))])
