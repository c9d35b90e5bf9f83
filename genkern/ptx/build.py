"""The C++ compiler, and a folder of what it has made."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

RUNTIME = Path(__file__).parent / "runtime"
# Rounding is ours: no fused products that nobody asked for; signed overflow wraps.
_FLAGS = [
    "-std=c++17",
    "-march=native",
    "-ffp-contract=off",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-fPIC",
    "-shared",
    "-w",
]
_RUNTIME_FLAGS = ["-O2", "-frounding-math"]
# Compiles in 0.6 of the time of -O1 and runs as fast: the time goes into the runtime's checks.
_KERNEL_FLAGS = ["-Og"]


class CompilerMissing(RuntimeError):
    """No C++ compiler: the executor needs one when it is used."""


def cache_folder():
    """Where compiled kernels are kept: $GENKERN_CACHE, else the user's cache folder."""
    named = os.environ.get("GENKERN_CACHE")
    if named:
        return Path(named) / "ptx"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "genkern" / "ptx"


@functools.cache
def compiler():
    """The command of the C++ compiler: $CXX, else c++, g++ or clang++."""
    named = os.environ.get("CXX")
    if named:
        return tuple(shlex.split(named))
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return (found,)
    raise CompilerMissing(
        "genkern.ptx needs a C++ compiler (c++, g++, clang++ or the one that CXX names), found none"
    )


@functools.cache
def _machine():
    """What the compiler says of itself and of this processor: part of every key."""
    command = [*compiler(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=True).stdout


def _key(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:32]


def _compile(key, arguments, name):
    """The path of the library that these arguments make; made where it is not there yet."""
    folder = cache_folder()
    path = folder / f"{name}-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # Beside, then renamed: two processes may make the same one.
    handle, beside = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [*compiler(), *_FLAGS, *arguments, "-o", beside]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"the C++ compiler refuses {name}: {' '.join(command)}\n{done.stderr[-4000:]}"
            )
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.unlink(beside)
    return path


@functools.cache
def runtime(folder=RUNTIME):
    """The loaded runtime library, and the key of its sources."""
    sources = sorted(folder.glob("*.cpp"))
    text = b"".join(p.name.encode() + p.read_bytes() for p in sorted(folder.glob("*.[hc]*")))
    key = _key(text, *_FLAGS, *_RUNTIME_FLAGS, _machine())
    # Kernels name it by its soname, not by its path: the folder may move, and two runtimes can live
    # in one process.
    soname = f"-Wl,-soname,runtime-{key}.so"
    path = _compile(key, [*_RUNTIME_FLAGS, soname, *map(str, sources)], "runtime")
    return ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW), key, path


def kernel(cpp, folder=RUNTIME):
    """The loaded library of one translated kernel."""
    _, runtime_key, runtime_path = runtime(folder)
    key = _key(cpp, *_KERNEL_FLAGS, runtime_key)
    path = cache_folder() / f"kernel-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "kernel.cpp"
            source.write_text(cpp)
            arguments = [*_KERNEL_FLAGS, f"-I{folder}", str(source), str(runtime_path)]
            path = _compile(key, arguments, "kernel")
    return ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
