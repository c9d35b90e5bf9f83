"""The package's own GPU backends on CPU tensors: launches are executed instead of launched.

with ptx.executing() as launches, genkern.use_backend("cuda"):
    out = genkern.attention(q, k, v)                # CPU tensors
print(launches[0].kernel, launches[0].result)

Everything before the launch is what happens on a GPU too: the op, its launcher, the sizes of grid,
block and shared memory, the tables. Of CUDA the shipped PTX is executed, of Triton what it compiles
for sm_80 (in a process without TRITON_INTERPRET=1).
"""

import contextlib
import struct
from typing import Any, NamedTuple

from genkern.ops import _cuda, _triton
from genkern.ptx import shipped
from genkern.ptx.execute import Module
from genkern.ptx.memory import WatchedMemory

TARGET = "sm_80"  # shipped PTX is for it too (setup.py), and it is the newest without wgmma


class Launched(NamedTuple):
    """One launch: kernel is the mangled name, or Triton's; result a `Result`, None where it was
    only recorded."""

    kernel: str
    grid: tuple
    block: tuple
    shared_bytes: int
    result: Any


@contextlib.contextmanager
def executing(schedule="sequential", module_of=shipped.module_of):
    """Executes the CUDA and Triton kernels that ops launch inside the `with`, on CPU tensors.

    Yields the list of `Launched`. schedule: as for `Module.launch`. module_of: gives the `Module`
    of a CUDA kernel's mangled name, where another than the shipped one is wanted. A kernel that
    breaks a rule (an access out of bounds, a race, …) is an `ExecutionError` from the op.
    """
    launches = []
    with WatchedMemory() as memory:

        def execute_cuda(kernel, grid, block, shared_bytes, arguments):
            result = module_of(kernel).launch(
                kernel,
                grid,
                block,
                arguments,
                shared_bytes=shared_bytes,
                buffers=memory.buffers(),
                schedule=schedule,
            )
            launches.append(Launched(kernel, grid, block, shared_bytes, result))

        def execute_triton(launch):
            from genkern.assembly import compiled

            kernel = compiled(launch, TARGET)
            grid = (*launch.grid, 1, 1)[:3]
            block = kernel.threads, 1, 1
            module = _triton_module(kernel.text)
            result = module.launch(
                kernel.kernel,
                grid,
                block,
                _triton_arguments(kernel, module),
                shared_bytes=kernel.shared_bytes,
                buffers=memory.buffers(),
                schedule=schedule,
            )
            launches.append(Launched(kernel.kernel, grid, block, kernel.shared_bytes, result))

        with _cuda.taking(execute_cuda), _triton.taking(execute_triton, TARGET):
            yield launches


@contextlib.contextmanager
def recording():
    """Collects the CUDA launches inside the `with` without executing them; results of ops are then
    garbage. Yields the list of `Launched`. (Triton's: genkern.ops._triton.recording.)"""
    launches = []

    def record(kernel, grid, block, shared_bytes, arguments):
        launches.append(Launched(kernel, grid, block, shared_bytes, None))

    with _cuda.taking(record):
        yield launches


_triton_modules = {}


def _triton_module(text):
    if text not in _triton_modules:
        _triton_modules[text] = Module(text)
    return _triton_modules[text]


_FORMATS = {
    "i1": "<?", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I",
    "i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d",
}  # fmt: skip


def _triton_arguments(kernel, module):
    """The bytes of each parameter. Last come Triton's own scratch pointers, of which these kernels
    make no use: as many as the version at hand has."""
    packed = []
    for kind, value in kernel.arguments:
        if kind.startswith("*"):
            packed.append(struct.pack("<Q", 0 if value is None else value.data_ptr()))
        else:
            packed.append(struct.pack(_FORMATS[kind], value))
    scratch = len(module.kernels[kernel.kernel].parameters) - len(packed)
    return packed + [bytes(8)] * scratch
