"""Every CUDA source of the package compiled for every target, and what can be read from that.

A compiled file, and what was read from it, are kept in the user's cache folder under a hash of
everything that went into them, so the report compiles only what changed.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import genkern
from genkern.static import kept, sass, tools

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Flags of setup.py that change the machine code; and ptxas tells of registers and spills.
_FLAGS = ["-std=c++17", "-O3", "-DGK_HAVE_CUDA", "-Xptxas=-v"]
# Sources whose instructions sm_75 does not have.
_NEEDS_SM_80 = ("attention",)


class Kernel(NamedTuple):
    """A kernel of one cubin. name: as C++ writes it; spills: bytes that a thread stores and loads
    because it has too few registers; stack: bytes of local memory of a thread; shared_bytes: static
    ones; loop: the inner one."""

    source: str
    symbol: str
    name: str
    target: str
    registers: int
    spills: int
    stack: int
    shared_bytes: int
    loop: sass.Loop

    @property
    def op(self):
        return self.source.partition("/")[0]


def sources(folder=None):
    """The .cu files, by default those beside the package. Raises OSError where there are none."""
    folder = Path(folder) if folder else Path(genkern.__file__).resolve().parent.parent / "csrc"
    found = sorted(folder.glob("*/*.cu"))
    if not found:
        raise OSError(
            f"no CUDA sources in {folder}: they are no part of the installed package; name the "
            f"csrc folder of genkern's source tree with --sources"
        )
    return found


def runs_on(source, target):
    """Whether a source is meant for a target at all."""
    return target != "sm_75" or source.parent.name not in _NEEDS_SM_80


def kernels(files, targets, say=lambda text: None):
    """The `Kernel`s of the sources on the targets, as many compilers at a time as processors."""
    jobs = [(source, target) for source in files for target in targets if runs_on(source, target)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda job: _kernels_of(*job, say), jobs))
    return [kernel for of_job in done for kernel in of_job]


def ptx_bytes(files, target="compute_120"):
    """The size of the PTX that later GPUs would compile, by source."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda source: compiled(source, target).stat().st_size, files)
        return {label(source): size for source, size in zip(files, done, strict=True)}


def label(source):
    return f"{source.parent.name}/{source.name}"


# What `ptxas -v` says of a kernel.
_SAID = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def _kernels_of(source, target, say):
    """From the cache or read now."""

    def make():
        say(f"{label(source)} for {target}")
        return [kernel._replace(loop=kernel.loop.plain()) for kernel in _read(source, target)]

    name = f"{source.stem}-{target}-{_digest(source, target)}-{kept.reader()}"
    found = [Kernel(*values) for values in kept.kept(name, make)]
    return [kernel._replace(loop=sass.Loop.of_plain(kernel.loop)) for kernel in found]


def _read(source, target):
    cubin = compiled(source, target)
    code = sass.functions(tools.output([tools.cuobjdump(), "-sass", str(cubin)]))
    names = tools.demangled(code)
    found = []
    for said in _SAID.finditer(cubin.with_suffix(".log").read_text()):
        symbol, shared = said["symbol"], re.search(r"(\d+) bytes smem", said["rest"])
        found.append(
            Kernel(
                label(source),
                symbol,
                short(names[symbol]),
                target,
                int(said["registers"]),
                int(said["stores"]) + int(said["loads"]),
                int(said["stack"]),
                int(shared[1]) if shared else 0,
                sass.inner_loop(code[symbol]),
            )
        )
    if len(found) != len(code):
        raise OSError(f"{label(source)}: {len(code)} kernels, and ptxas speaks of {len(found)}")
    return sorted(found, key=lambda kernel: kernel.name)


def short(name):
    """A kernel's C++ name without its arguments and namespaces, dtypes by their usual names."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").partition("(")[0]
    name = re.sub(r"\b(?:\w+::)+", "", name)
    for long, usual in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32")):
        name = re.sub(rf"\b{long}\b", usual, name)
    return re.sub(r"\bdouble\b", "fp64", name)


def compiled(source, target):
    """The cubin (of a compute_… target the PTX) of a source, from the cache or made now; beside a
    cubin lies what ptxas said."""
    kind = "ptx" if target.startswith("compute_") else "cubin"
    path = kept.folder() / f"{source.stem}-{target}-{_digest(source, target)}.{kind}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        command = [tools.nvcc(), *_FLAGS, f"-{kind}", f"-arch={target}"]
        said = tools.output([*command, str(source), "-o", str(part)])
        path.with_suffix(".log").write_text(said)
        part.rename(path)
    return path


def _digest(source, target):
    """A hash of the source, of what it includes, of the compiler and its flags."""
    texts, waiting, seen = [], [source.resolve()], set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        texts.append(path.read_text())
        included = re.findall(r'^\s*#include "([^"]+)"', texts[-1], re.M)
        waiting += [(path.parent / name).resolve() for name in included]
    return kept.digest(
        f"{tools.nvcc_version()} {target} {_FLAGS}".encode(), "".join(texts).encode()
    )
