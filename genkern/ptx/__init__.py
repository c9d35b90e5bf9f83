"""Executes PTX on the CPU: what nvcc and Triton made of a kernel, with its meaning and its mistakes.

    module = ptx.Module(text)
    result = module.launch("kernel", grid=(4, 1, 1), block=128, args=[x, y, 1000, 2.0])

Every thread of a block runs as a fiber, in an order that is sequential, reversed or shuffled by a
seed. Each access is checked: inside a buffer that the launch names, writable where it writes,
aligned, initialised (shared memory), and in no race with another thread's. An instruction that the
executor doesn't know is refused before anything runs.

    with ptx.executing(), genkern.use_backend("cuda"):
        out = genkern.attention(q, k, v)        # the whole op, on CPU tensors
"""

from genkern.ptx.build import CompilerMissing
from genkern.ptx.errors import (
    AbsentLane,
    Deadlock,
    Divergence,
    ExecutionError,
    Misaligned,
    OutOfBounds,
    Race,
    ReadOnly,
    Trap,
    Uninitialised,
    UnsupportedPTX,
)
from genkern.ptx.execute import Buffer, Kernel, Module, Result
from genkern.ptx.executing import Launched, executing, recording

__all__ = [
    "AbsentLane",
    "Buffer",
    "CompilerMissing",
    "Deadlock",
    "Divergence",
    "ExecutionError",
    "Kernel",
    "Launched",
    "Misaligned",
    "Module",
    "OutOfBounds",
    "Race",
    "ReadOnly",
    "Result",
    "Trap",
    "Uninitialised",
    "UnsupportedPTX",
    "executing",
    "recording",
]
