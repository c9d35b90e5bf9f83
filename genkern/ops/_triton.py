"""What the ops share of Triton: whether it can be used, and launches.

Nothing here imports Triton before it is wanted: `import genkern` needs none, and a Triton that
cannot be imported is a sentence (`problem`), not an error. Kernels live in the ops' own triton
modules, and all of them are launched by `launch`, which compilers and tests can watch.
"""

import contextlib
import functools
import importlib
import os
import struct
from importlib import metadata
from typing import Any, NamedTuple

import torch

# The versions whose kernels the tests have run and compiled: below the first the backend says so
# and stays away, above the last it tries.
OLDEST_TESTED, NEWEST_TESTED = "3.4", "3.9"

# What a Triton option's default may change between versions is said here.
_OPTIONS = {"enable_fp_fusion": True}


@functools.cache
def version():
    """Triton's version as it is installed, or None."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


@functools.cache
def problem():
    """Why no Triton kernel can be used here, in one sentence; None where they can."""
    found = version()
    if found is None:
        return "Triton is not installed: pip install triton"
    if _numbers(found) < _numbers(OLDEST_TESTED):
        return (
            f"Triton {found} is older than the kernels were tested with, "
            f"{OLDEST_TESTED} to {NEWEST_TESTED}: pip install -U triton"
        )
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # an import of foreign code may fail in any way
        return f"Triton {found} is installed but cannot be imported: {error}"
    return None


def has_fp64_products():
    """Whether tl.dot takes doubles."""
    return _numbers(version()) >= (3, 5)


def has_fp64_products_of_bytes():
    """Whether it takes doubles that were made from single bytes, such as a mask's. Up to 3.8 such
    kernels did not compile."""
    return _numbers(version()) >= (3, 9)


def _numbers(text):
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


def element_type(dtype):
    """Triton's name for a torch dtype."""
    return getattr(importlib.import_module("triton.language"), str(dtype).removeprefix("torch."))


def double_bits(x):
    """A double as the integer of its bits: as a float Triton would pass it in fp32."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


def is_interpreting():
    """Whether kernels run in Triton's interpreter, on CPU tensors. To be set before the first op:
    Triton reads it when a kernel's module is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# ---- Launches -----------------------------------------------------------------------------------


class Launch(NamedTuple):
    """One launch: everything that `kernel[grid](*args, **options)` is given."""

    kernel: Any
    grid: tuple
    args: tuple
    options: dict


_taken = None  # (the function that takes launches, the target that they are for) while `taking`


@contextlib.contextmanager
def taking(function, target):
    """function(Launch) is called in the place of every launch, as if the tensors, which may be on
    the CPU, were on a GPU of this kind: "sm_90", "gfx942", …"""
    global _taken
    before, _taken = _taken, (function, target)
    try:
        yield
    finally:
        _taken = before


@contextlib.contextmanager
def recording(target):
    """Collects the launches inside the `with` instead of launching. Their results are garbage."""
    launches = []
    with taking(launches.append, target):
        yield launches


def is_taken():
    """Whether launches go elsewhere than to a driver, so that tensors may be on the CPU."""
    return _taken is not None


def launch(kernel, grid, *args, **options):
    """kernel[grid](*args, **options), with the options that every kernel gets."""
    options = {**_OPTIONS, **options}
    if _taken is not None:
        _taken[0](Launch(kernel, grid, args, options))
    else:
        kernel[grid](*args, **options)


def target(tensor):
    """The kind of GPU that a kernel on this tensor is configured for: "sm_80", "gfx942", …; in the
    interpreter "interpreter"."""
    if _taken is not None:
        return _taken[1]
    if not tensor.is_cuda:
        return "interpreter"
    return _target_of(tensor.device.index or 0)


@functools.cache
def _target_of(index):
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
