"""The PTX of the package's own CUDA kernels, as the build made it."""

import functools
import gzip
import re
from pathlib import Path

from genkern.ptx.execute import Module

FOLDER = Path(__file__).resolve().parent / "shipped"


def files():
    """The shipped files, one for each csrc/<op>/<file>.cu: <op>.<file>.ptx.gz. Empty where CUDA was
    not built."""
    return sorted(FOLDER.glob("*.ptx.gz"))


@functools.cache
def text(file):
    return gzip.decompress(file.read_bytes()).decode()


@functools.cache
def _file_of_kernels():
    return {name: file for file in files() for name in re.findall(r"\.entry\s+(\w+)", text(file))}


def kernels():
    """The mangled names of all kernels."""
    return list(_file_of_kernels())


def text_of(kernel):
    """The PTX of the file that holds the kernel of this mangled name."""
    found = _file_of_kernels().get(kernel)
    if found is None:
        raise RuntimeError(
            f"no PTX was shipped for the kernel {kernel}: the CUDA half of this build is missing "
            f"or is not the one that launched it (see `genkern info`)"
        )
    return text(found)


def module_of(kernel):
    """The `Module` that holds the kernel of this mangled name."""
    return _module(text_of(kernel))


@functools.cache
def _module(text):
    return Module(text)
