"""What a Triton kernel becomes on a GPU that this machine does not have.

    with recording("sm_90") as launches:
        genkern.attention(q, k, v)          # on CPU tensors; nothing is launched
    found = compiled(launches[0], "sm_90")
    found.registers, found.spills, found.shared_bytes, found.instructions("wgmma.mma")

Triton's own just-in-time path does it, with a stand-in for the driver, so types and specialisations
(which numbers are divisible by 16, …) are those of the launch.
"""

import json
import re
import subprocess
import tempfile
from importlib import util
from pathlib import Path
from typing import NamedTuple

from genkern.backend import use_backend
from genkern.ops._triton import is_interpreting, recording

# Shared memory that one block may use, in bytes.
TARGETS = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


# Instructions of tensor cores: of sm_80 and sm_120, 90, 100, and AMD's.
TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma")


class Assembly(NamedTuple):
    """text: PTX or AMD GCN. registers: of a thread. spills: bytes of memory of its own that a
    thread needs beside them (AMD's scalars that lie in lanes of vector registers need none).
    shared_bytes: of a block. threads: of a block. arguments: (type, value) of each parameter, in
    Triton's names of types; Triton's own scratch pointers come after them. binary: cubin or
    hsaco."""

    kernel: str
    target: str
    text: str
    registers: int
    spills: int
    shared_bytes: int
    threads: int
    arguments: list
    binary: bytes

    def instructions(self, name):
        """How many instructions have this in their name."""
        return len(re.findall(rf"^\s*(?:@\S+\s+)?\S*{re.escape(name)}", self.text, re.MULTILINE))


def compiled(launch, target):
    """The `Assembly` of a recorded launch. Raises RuntimeError where kernels are interpreted. After
    it this process has no driver to launch a kernel with."""
    if is_interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is 1: kernels of this process are interpreted, not compiled"
        )
    from triton.runtime import driver

    driver.set_active(_Driver(target))
    result = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    name, shared = launch.kernel.__name__, result.metadata.shared
    # Of a warp; older versions do not tell.
    threads = result.metadata.num_warps * (64 if target.startswith("gfx") else 32)
    call = threads, _arguments(launch, result.src.signature)
    if target.startswith("gfx"):
        text = result.asm["amdgcn"]
        spills = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        binary = result.asm["hsaco"]
        return Assembly(name, target, text, registers, spills, shared, *call, binary)
    text, binary = result.asm["ptx"], result.asm["cubin"]
    usage = _resource_usage(binary)
    registers, spills = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    return Assembly(name, target, text, registers, spills, shared, *call, binary)


def _arguments(launch, signature):
    """(type, value) of what is passed at run time: no constants, tuples flattened."""
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    found = []

    def add(kind, value):
        if isinstance(kind, tuple):
            for each, part in zip(kind, value, strict=True):
                add(each, part)
        elif kind != "constexpr":
            found.append((kind, value))

    for name, kind in signature.items():
        add(kind, values.get(name))
    return found


def report(cases, targets):
    """Prints a line of JSON for every launch of every case (name: a function that calls an op on
    CPU tensors) on every target: kernel, target, registers, spills, shared_bytes, options,
    instructions (tensor-core ones, by name) and case."""
    for target in targets:
        for name, call in cases.items():
            with use_backend("triton"), recording(target) as launches:
                call()
            for launch in launches:
                found = compiled(launch, target)
                left_out = "text", "arguments", "binary"
                row = {k: v for k, v in found._asdict().items() if k not in left_out}
                row["options"] = {k: v for k, v in launch.options.items() if k.startswith("num_")}
                row["instructions"] = {name: found.instructions(name) for name in TENSOR_CORES}
                print(json.dumps({"case": name, **row}), flush=True)


class _Driver:
    """As much of a driver as Triton asks for before it launches."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        if self.target.startswith("gfx"):
            return GPUTarget("hip", self.target, 64)
        return GPUTarget("cuda", int(self.target.removeprefix("sm_")), 32)

    def get_current_device(self):
        return self.target  # Triton keeps what it compiled by device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return "cpu"


def _number(pattern, text):
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"nothing like {pattern!r} in what the compiler said: {text[:200]!r}")
    return int(found[1])


def _resource_usage(cubin):
    """What cuobjdump, which comes inside Triton's package, tells of a cubin."""
    folder = Path(util.find_spec("triton").origin).parent
    tool = folder / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
