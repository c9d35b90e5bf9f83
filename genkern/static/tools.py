"""The compilers and disassemblers that the static report calls."""

import functools
import os
import re
import shutil
import subprocess
from importlib import util
from pathlib import Path


def nvcc():
    """The path of nvcc: of CUDA_HOME, of PATH, or of PyPI's packages. Raises OSError."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    if found := shutil.which("nvcc"):
        return found
    spec = util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else []:
        for found in sorted(Path(folder).glob("*/bin/nvcc")):
            return str(found)
    raise OSError(
        "the CUDA sources need an nvcc, and there is none in CUDA_HOME, on PATH or from PyPI: "
        "GENKERN_CUDA=1 pip install '.[test,nvcc]' brings one"
    )


def cuobjdump():
    """The path of cuobjdump: of PATH, else Triton's. Raises OSError."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = util.find_spec("triton")
    if spec:
        found = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if found.exists():
            return str(found)
    raise OSError("cuobjdump is neither on PATH nor in Triton's package: pip install triton")


@functools.cache
def nvcc_version():
    """Like "13.0"."""
    return version_of(nvcc())


def output(command, **options):
    """What a command prints, on either stream. Raises OSError with it where the command fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode:
        raise OSError(f"{Path(command[0]).name} failed: {done.stdout.strip()[-2000:]}")
    return done.stdout


def demangled(names):
    """{mangled: C++ name}; the names as they are where there is no c++filt."""
    names = list(names)
    tool = shutil.which("c++filt")
    if not tool or not names:
        return {name: name for name in names}
    lines = output([tool], input="\n".join(names)).splitlines()
    return dict(zip(names, lines, strict=True))


def version_of(tool):
    """Like "13.0", of a tool of CUDA."""
    return re.search(r"release (\S+),", output([tool, "--version"]))[1]
