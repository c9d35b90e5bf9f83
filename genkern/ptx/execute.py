"""Modules, kernels and launches.

    module = Module(text)
    result = module.launch("scale", grid=4, block=128, args=[x, y, 128, 2.0])

A launch runs on one core, block by block; one launch at a time in a process.
"""

import ctypes
import struct
import threading
import time
from typing import NamedTuple

import numpy as np

from genkern.ptx import build
from genkern.ptx.errors import FAULTS, ExecutionError, UnsupportedPTX
from genkern.ptx.parse import parse
from genkern.ptx.rules import TABLE
from genkern.ptx.translate import translate

_ONE_AT_A_TIME = threading.Lock()


class Buffer(NamedTuple):
    """Memory that a kernel may reach: address and bytes; writable; a name for messages."""

    address: int
    nbytes: int
    writable: bool = True
    name: str = ""


class Result(NamedTuple):
    """What a launch did. Bytes are those of global memory, as the threads asked for them; barriers
    are counted once for each thread that came."""

    instructions: int
    barriers: int
    bytes_read: int
    bytes_written: int
    seconds: float


class _Failure(ctypes.Structure):
    _fields_ = (
        ("fault", ctypes.c_int32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("line", ctypes.c_uint32),
        ("message", ctypes.c_char * 1000),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
    )


class _Launch(ctypes.Structure):
    # As struct Launch in runtime/machine.h.
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("parameters", ctypes.c_void_p),
        ("parameter_bytes", ctypes.c_uint64),
        ("symbols", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
        ("buffer_count", ctypes.c_uint64),
        ("holes", ctypes.c_void_p),
        ("hole_count", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("static_bytes", ctypes.c_uint32),
        ("dynamic_bytes", ctypes.c_uint32),
        ("stack_bytes", ctypes.c_uint64),
        ("local_bytes", ctypes.c_uint64),
        ("schedule", ctypes.c_uint64),
        ("instructions", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("failure", _Failure),
    )


class Kernel:
    """One entry of a module: name, parameters (name, type, size, alignment, offset),
    static_shared_bytes. It is translated when first asked for anything, compiled when launched."""

    def __init__(self, module, name):
        self.module, self.name = module, name
        self._translation = self._library = None

    @property
    def translation(self):
        if self._translation is None:
            self._translation = translate(self.module.program, self.name, self.module.table)
        return self._translation

    @property
    def parameters(self):
        return self.translation.parameters

    @property
    def static_shared_bytes(self):
        return self.translation.static_bytes

    def compiled(self):
        """The address of the kernel's machine code."""
        if self._library is None:
            self._library = build.kernel(self.translation.cpp, self.module.runtime)
        return ctypes.cast(self._library.kernel, ctypes.c_void_p).value


class Module:
    """The kernels of one PTX text. Variables of .global space live as long as the module."""

    def __init__(self, text, table=TABLE, runtime=build.RUNTIME):
        self.text, self.table, self.runtime = text, table, runtime
        self.program = parse(text)
        self.kernels = {
            name: Kernel(self, name)
            for name, function in self.program.functions.items()
            if function.is_entry
        }
        self._variables = {}
        for variable in self.program.variables.values():
            if variable.space in ("global", "const"):
                self._variables[variable.name] = _memory_of(variable)

    def variable(self, name):
        """The bytes of a .global or .const variable, as a NumPy array of uint8 on its memory."""
        return self._variables[name][0]

    def launch(self, name, grid, block, args, shared_bytes=0, buffers=(), schedule="sequential"):
        """Runs a kernel to its end.

        name: mangled. grid, block: a number or up to three. args: one for each parameter, a NumPy
        array (its address; it may only be read where array.flags.writeable is False), an int, a
        float, or bytes (a struct). shared_bytes: dynamic shared memory. buffers: further memory
        that the kernel may reach: arrays or `Buffer`s. schedule: "sequential", "reversed", or an
        int, the seed of a shuffled order of threads and blocks.

        Raises `UnsupportedPTX` at the first launch, and an `ExecutionError` of the kind that names
        what the kernel did wrong. Returns a `Result`.
        """
        if name not in self.kernels:
            raise KeyError(f"the module has no kernel {name}; it has {', '.join(self.kernels)}")
        kernel = self.kernels[name]
        translation = kernel.translation
        reached = [_buffer(b) for b in [*args, *buffers] if isinstance(b, (np.ndarray, Buffer))]
        reached += [
            Buffer(array.ctypes.data, array.nbytes, space == "global", variable)
            for variable, (array, space) in self._variables.items()
        ]
        parameters = _packed(translation.parameters, args)
        packed = np.frombuffer(parameters, np.uint8) if parameters else np.zeros(1, np.uint8)
        aligned = _aligned(packed.nbytes)
        aligned[:] = packed
        reached.append(Buffer(aligned.ctypes.data, aligned.nbytes, False, "parameters"))
        launch = _Launch()
        launch.kernel = kernel.compiled()
        launch.parameters, launch.parameter_bytes = aligned.ctypes.data, len(parameters)
        addresses = [self._variables[s][0].ctypes.data for s in translation.symbols]
        symbols = (ctypes.c_uint64 * max(1, len(addresses)))(*addresses)
        launch.symbols = ctypes.addressof(symbols)
        table = (_Buffer * len(reached))(
            *((b.address, b.nbytes, b.writable, b.name.encode()) for b in reached)
        )
        launch.buffers, launch.buffer_count = ctypes.addressof(table), len(reached)
        flat = [edge for hole in translation.holes for edge in hole]
        holes = (ctypes.c_uint32 * max(1, len(flat)))(*flat)
        launch.holes, launch.hole_count = ctypes.addressof(holes), len(flat) // 2
        launch.grid = (ctypes.c_uint32 * 3)(*_extents(grid, "grid"))
        launch.block = (ctypes.c_uint32 * 3)(*_extents(block, "block"))
        _check_block(self.program.functions[name], list(launch.block))
        launch.static_bytes, launch.dynamic_bytes = translation.shared_bytes, shared_bytes
        launch.stack_bytes = 128 * 1024 + 32 * translation.registers
        launch.local_bytes = -(-translation.local_bytes // 64) * 64
        launch.schedule = _schedule(schedule)
        run = build.runtime(self.runtime)[0].ptx_launch
        with _ONE_AT_A_TIME:
            start = time.perf_counter()
            run(ctypes.byref(launch))
            seconds = time.perf_counter() - start
        if launch.failure.fault >= 0:
            raise self._error(name, launch.failure)
        return Result(
            launch.instructions, launch.barriers, launch.bytes_read, launch.bytes_written, seconds
        )

    def _error(self, name, failure):
        lines = self.text.split("\n")
        line = failure.line
        text = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        kind = FAULTS[failure.fault] if failure.fault < len(FAULTS) else ExecutionError
        block, thread = tuple(failure.block), tuple(failure.thread)
        return kind(failure.message.decode(errors="replace"), name, block, thread, line, text)


def _aligned(nbytes, alignment=256):
    raw = np.zeros(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes]


def _memory_of(variable):
    if variable.length is None:
        raise UnsupportedPTX("a variable of unknown length", variable.line, variable.name)
    memory = _aligned(max(1, variable.length))
    if variable.data:
        memory[: len(variable.data)] = np.frombuffer(variable.data, np.uint8)
    return memory, variable.space


def _buffer(b):
    if isinstance(b, Buffer):
        return b
    low = high = b.ctypes.data
    for extent, stride in zip(b.shape, b.strides, strict=True):
        low += min(0, (extent - 1) * stride)
        high += max(0, (extent - 1) * stride)
    nbytes = high + b.itemsize - low if b.size else 0
    return Buffer(low, nbytes, b.flags.writeable, f"{b.dtype}{list(b.shape)}")


def _packed(parameters, args):
    if len(parameters) != len(args):
        raise TypeError(f"args: the kernel has {len(parameters)} parameters, {len(args)} came")
    data = bytearray(max((p.offset + p.size for p in parameters), default=0))
    for p, value in zip(parameters, args, strict=True):
        data[p.offset : p.offset + p.size] = _bytes_of(p, value)
    return bytes(data)


def _bytes_of(parameter, value):
    name, type_, size = parameter.name, parameter.type, parameter.size
    if isinstance(value, (bytes, bytearray)):
        if len(value) != size:
            raise TypeError(f"args: {name} has {size} bytes, {len(value)} came")
        return bytes(value)
    if isinstance(value, np.ndarray):
        value = value.ctypes.data
    elif isinstance(value, Buffer):
        value = value.address
    if isinstance(value, (float, np.floating)) or type_ in ("f32", "f64"):
        code = {4: "<f", 8: "<d", 2: "<e"}.get(size)
        if code is None:
            raise TypeError(f"args: {name} has {size} bytes, a float came")
        return struct.pack(code, value)
    if isinstance(value, (int, np.integer)) and size <= 8:
        return (int(value) % (1 << 8 * size)).to_bytes(size, "little")
    raise TypeError(
        f"args: {name} is a {type_} of {size} bytes; an array, an int, a float or bytes expected, "
        f"{type(value).__name__} came"
    )


def _extents(value, what):
    sizes = [value] if isinstance(value, (int, np.integer)) else list(value)
    sizes += [1] * (3 - len(sizes))
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"{what}: one to three numbers of at least 1 expected, {value} came")
    return sizes


def _check_block(function, block):
    count = block[0] * block[1] * block[2]
    if count > 1024:
        raise ValueError(f"block: at most 1024 threads, {count} came")
    if function.threads and tuple(block) != function.threads:
        raise ValueError(f"block: the kernel demands {function.threads}, {tuple(block)} came")
    if function.max_threads and count > function.max_threads:
        raise ValueError(f"block: the kernel takes {function.max_threads} threads, {count} came")


def _schedule(schedule):
    if schedule == "sequential":
        return 0
    if schedule == "reversed":
        return 1
    if isinstance(schedule, (int, np.integer)) and schedule >= 0:
        return int(schedule) + 2
    raise ValueError(f'schedule: "sequential", "reversed" or a seed expected, {schedule!r} came')
