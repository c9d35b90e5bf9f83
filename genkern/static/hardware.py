"""The public numbers of the GPUs that the report speaks of, and what follows from them.

The limits of a multiprocessor are those of the CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"; the peaks are those that NVIDIA's whitepapers and data
sheets print for the boards named here, dense, at boost clocks.
"""

from typing import NamedTuple

WARP = 32
REGISTERS = 65536  # of a multiprocessor
_REGISTER_UNIT = 256  # a warp's registers are handed out in such pieces
_PARTITIONS = 4  # of a multiprocessor, each with a quarter of the registers


class Limits(NamedTuple):
    """Of one multiprocessor: warps, blocks, bytes of shared memory; shared_of_block: the most that
    one block may have of it; reserved: what the system takes of it for each block."""

    warps: int
    blocks: int
    shared: int
    shared_of_block: int
    reserved: int = 1024


LIMITS = {
    "sm_75": Limits(32, 16, 64 * 1024, 64 * 1024, 0),
    "sm_80": Limits(64, 32, 164 * 1024, 163 * 1024),
    "sm_86": Limits(48, 16, 100 * 1024, 99 * 1024),
    "sm_89": Limits(48, 24, 100 * 1024, 99 * 1024),
    "sm_90": Limits(64, 32, 228 * 1024, 227 * 1024),
    "sm_100": Limits(64, 32, 228 * 1024, 227 * 1024),
    "sm_120": Limits(48, 24, 100 * 1024, 99 * 1024),
}


class Board(NamedTuple):
    """Peaks by what computes: tensor (bf16 and fp16 with fp32 sums; 0: none for bf16), fp32, fp64,
    in operations a second, and bytes a second of memory."""

    name: str
    tensor: float
    fp32: float
    fp64: float
    memory: float


BOARDS = {
    "sm_75": Board("T4", 65e12, 8.1e12, 0.254e12, 320e9),
    "sm_80": Board("A100 SXM 80 GB", 312e12, 19.5e12, 9.7e12, 2039e9),
    "sm_86": Board("RTX 3090", 71e12, 35.6e12, 0.556e12, 936e9),
    "sm_89": Board("RTX 4090", 165.2e12, 82.6e12, 1.29e12, 1008e9),
    "sm_90": Board("H100 SXM", 989.4e12, 66.9e12, 33.5e12, 3350e9),
    "sm_100": Board("B200", 2250e12, 80e12, 40e12, 8000e9),
    "sm_120": Board("RTX 5090", 209.5e12, 104.8e12, 1.64e12, 1792e9),
}


class Occupancy(NamedTuple):
    """blocks and warps of a multiprocessor at a time; share of the warps that it could hold."""

    blocks: int
    warps: int
    share: float
    limited_by: str


def occupancy(target, threads, registers, shared_bytes):
    """How many blocks of so many threads, registers a thread and bytes of shared memory (static
    and dynamic) are on a multiprocessor at once; 0 where one does not fit."""
    limits = LIMITS[target]
    warps = -(-threads // WARP)
    of_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = REGISTERS // _PARTITIONS // of_warp * _PARTITIONS if of_warp else limits.warps
    fitting = {
        "registers": by_registers // warps,
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    if shared_bytes:
        room = limits.shared if shared_bytes <= limits.shared_of_block else 0
        fitting["shared memory"] = room // (shared_bytes + limits.reserved)
    limited_by = min(fitting, key=fitting.get)
    blocks = fitting[limited_by]
    return Occupancy(blocks, blocks * warps, blocks * warps / limits.warps, limited_by)
