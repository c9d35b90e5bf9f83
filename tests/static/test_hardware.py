"""Occupancy, against numbers that NVIDIA's occupancy calculator is known to give."""

import pytest

from genkern.assembly import TARGETS
from genkern.static.hardware import BOARDS, LIMITS, occupancy


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "blocks", "limited_by"),
    [
        ("sm_80", 256, 32, 0, 8, "registers"),
        ("sm_80", 256, 33, 0, 6, "registers"),  # 40 registers a thread are handed out
        ("sm_80", 128, 255, 0, 2, "registers"),
        ("sm_80", 32, 16, 0, 32, "blocks"),
        ("sm_86", 256, 32, 0, 6, "warps"),
        ("sm_80", 128, 32, 40 * 1024, 4, "shared memory"),  # 41 KiB each with the reserved one
        ("sm_86", 128, 32, 99 * 1024, 1, "shared memory"),
        ("sm_86", 128, 32, 100 * 1024, 0, "shared memory"),
        ("sm_75", 128, 32, 32 * 1024, 2, "shared memory"),
        ("sm_90", 128, 32, 113 * 1024, 2, "shared memory"),
    ],
)
def test_occupancy(target, threads, registers, shared, blocks, limited_by):
    found = occupancy(target, threads, registers, shared)
    assert (found.blocks, found.limited_by) == (blocks, limited_by)
    assert found.warps == blocks * threads // 32
    assert found.share == found.warps / LIMITS[target].warps


def test_the_limits_are_those_that_tritons_kernels_are_held_to():
    for target, limits in LIMITS.items():
        assert target in BOARDS
        if target in TARGETS:
            assert TARGETS[target] == limits.shared_of_block
