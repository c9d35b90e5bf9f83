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


# Those whose products all have tiles that tensor cores of their own kind take, at any width.
FIRST_ORDER = {"attention_forward", "attention_backward_rows", "attention_backward_columns"}


def assert_on_tensor_cores(rows):
    """Every kernel, and those of first order by the target's own instruction."""
    for row in rows:
        assert sum(row["instructions"].values()), row
        if row["kernel"] in FIRST_ORDER:
            assert row["instructions"][CORES[row["target"]]], row


def test_every_pass_on_every_target(assemblies, fits):
    found = assemblies("compile_attention.py", "every pass")
    fits(found)
    assert_on_tensor_cores(found)
    for target in CORES:
        assert {row["kernel"] for row in found if row["target"] == target} == PASSES


def test_wide_heads(assemblies, fits):
    """d = 128 without a mask, forward and backward, where the instructions are not those of
    sm_80."""
    found = assemblies("compile_attention.py", "wide", only=("sm_90", "sm_100", "gfx942"))
    assert len(found) == 3 * len(FIRST_ORDER)
    fits(found)
    assert_on_tensor_cores(found)


def test_with_everything_that_takes_registers(assemblies, fits):
    fits(assemblies("compile_attention.py", "heavy", only=("sm_80",)))


# Those that no configuration of the search keeps in registers (benchmarks/NOTES.md): bytes.
SPILLING = {
    ("gfx942", "fp32 128 heavy", "attention_second_columns"): 36,
    ("sm_90", "fp64 64 heavy", "attention_second_columns"): 40,
    ("sm_100", "fp64 64 heavy", "attention_second_columns"): 40,
}


@pytest.mark.exhaustive
def test_grid(assemblies, fits):
    """Every kernel in every default configuration."""
    found = assemblies("compile_attention.py", "grid,narrow")
    known = [SPILLING.get((row["target"], row["case"], row["kernel"])) for row in found]
    fits([row for row, spills in zip(found, known, strict=True) if spills is None])
    assert all(row["spills"] <= n for row, n in zip(found, known, strict=True) if n is not None)
    half = [row for row in found if row["case"].split()[0] in ("bf16", "fp16")]
    assert_on_tensor_cores([row for row in half if row["case"].split()[1] in ("64", "128")])


@pytest.mark.exhaustive
def test_without_a_mask(assemblies, fits):
    """And where the rows of v are narrower or wider: on the target whose lines were searched so."""
    fits(assemblies("compile_attention.py", "unmasked", only=("sm_90",)))
