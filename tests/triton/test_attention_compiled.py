"""Attention's Triton kernels compiled ahead of time for GPUs that are not here: no spills, room for
their shared memory, and the tensor-core instructions of each. Compiled, not run."""

import pytest

# By target: the instruction of its tensor cores for products of half precision.
CORES = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
}
PASSES = {
    "attention_forward",
    "attention_backward_rows",
    "attention_backward_columns",
    "attention_second_stats",
    "attention_second_rows",
    "attention_second_columns",
    "attention_jvp",
}


def test_every_pass_on_every_target(assemblies, fits):
    found = assemblies("compile_attention.py", "every pass")
    fits(found)
    for target, instruction in CORES.items():
        rows = [row for row in found if row["target"] == target]
        assert {row["kernel"] for row in rows} >= PASSES
        for row in rows:
            if row["kernel"] in ("attention_forward", "attention_backward_rows"):
                assert row["instructions"][instruction], row
            assert sum(row["instructions"].values()), row


def test_tensor_cores(assemblies, fits):
    """Forward and both sweeps of the backward, in bf16 and fp16, at d = 64 and 128."""
    found = assemblies("compile_attention.py", "tensor cores", only=("sm_90", "sm_100", "gfx942"))
    assert len(found) == 3 * 4 * 3
    fits(found)
    for row in found:
        assert row["instructions"][CORES[row["target"]]], row


def test_with_everything_that_takes_registers(assemblies, fits):
    fits(assemblies("compile_attention.py", "heavy,narrow", only=("sm_80", "gfx942")))


@pytest.mark.exhaustive
def test_grid(assemblies, fits):
    fits(assemblies("compile_attention.py", "grid,tensor cores,heavy,narrow"))
