"""What the ops share of Triton: whether it can be used, tables of pointers, launches.

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


_recorded = None  # (a list of launches, the target that they are meant for) while `recording`


@contextlib.contextmanager
def recording(target):
    """Collects the launches inside the `with` instead of launching, as if the tensors, which may be
    on the CPU, were on a GPU of this kind: "sm_90", "gfx942", … Their results are garbage."""
    global _recorded
    before, _recorded = _recorded, ([], target)
    try:
        yield _recorded[0]
    finally:
        _recorded = before


def is_recording():
    return _recorded is not None


def launch(kernel, grid, *args, **options):
    """kernel[grid](*args, **options), with the options that every kernel gets."""
    options = {**_OPTIONS, **options}
    if _recorded is not None:
        _recorded[0].append(Launch(kernel, grid, args, options))
    else:
        kernel[grid](*args, **options)


def target(tensor):
    """The kind of GPU that a kernel on this tensor is configured for: "sm_80", "gfx942", …; in the
    interpreter "interpreter"."""
    if _recorded is not None:
        return _recorded[1]
    if not tensor.is_cuda:
        return "interpreter"
    return _target_of(tensor.device.index or 0)


@functools.cache
def _target_of(index):
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def on_device(tensor):
    """A `with` in which launches go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# ---- Tables -------------------------------------------------------------------------------------

# A captured CUDA graph reads its tables again at every replay.
_tables_of_graphs = []


def device_table(rows, device):
    """The int64 numbers (addresses, sizes, …) as a tensor on the device; without waiting for it."""
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type != "cuda":
        return table
    table = table.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _tables_of_graphs.append(table)
    return table.to(device, non_blocking=True)
