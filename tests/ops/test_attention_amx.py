"""Attention in bf16 at the level amx: what its tiles of 16 and 32 could get wrong at ragged edges.
How exact it is, is asked with all levels in test_attention_exact.py."""

import pytest
import torch
from attention_passes import passes

import genkern
from genkern._native import native

pytestmark = pytest.mark.skipif(
    "amx" not in native.cpu_levels(), reason="this machine or build has no AMX"
)


def tensors(N, M, d, dv):
    draw = lambda *shape: torch.randn(shape).bfloat16()  # noqa: E731
    return draw(1, 2, N, d), draw(1, 2, M, d), draw(1, 2, M, dv)


@pytest.mark.parametrize("N", [1, 16, 17, 33, 64, 65, 130])
@pytest.mark.parametrize(("M", "d", "dv"), [(1, 1, 3), (31, 33, 16), (65, 64, 40), (130, 17, 65)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_ragged_edges_agree_with_the_level_below(N, M, d, dv, is_causal, at_level, poisoned):
    q, k, v = tensors(N, M, d, dv)
    # Far above what exp can take: lanes that stand for no query must not let it through.
    bias = torch.full((1, 1, 1, M), 200.0)
    bias[..., M // 2 :] += 1
    at_level("amx")
    found = passes(q, k, v, bias, is_causal=is_causal)
    at_level("avx512")
    expected = passes(q, k, v, bias, is_causal=is_causal)
    for name, wanted in expected.items():
        assert found[name].isfinite().all(), name
        error = (found[name].float() - wanted.float()).abs().max()
        # Two roundings of 2⁻⁹ each way, and sums of many that were rounded once.
        assert error <= 2**-6 * max(1, wanted.float().abs().max()), name


def test_a_lone_key_is_exact(at_level):
    q, k, v = tensors(20, 1, 24, 24)
    at_level("amx")
    found = passes(q, k, v, None)
    assert torch.equal(found["out"], v.expand_as(found["out"]))
    assert found["dq"].count_nonzero() == 0 and found["dk"].count_nonzero() == 0


def test_a_nan_stays_with_those_who_see_it(at_level):
    q, k, v = tensors(40, 40, 32, 32)
    k[:, :, 30, 0] = float("nan")
    at_level("amx")
    with genkern.use_backend("cpu"):
        out = genkern.attention(q, k, v, is_causal=True)
    assert out[:, :, :30].isfinite().all() and out[:, :, 30:].isnan().all()


def test_the_tiles_are_what_computes(at_level):
    """P is rounded to bf16 here, and not one level below: the results can't be the same bits."""
    q, k, v = tensors(64, 256, 64, 64)
    at_level("amx")
    found = passes(q, k, v, None)
    at_level("avx512")
    expected = passes(q, k, v, None)
    assert all(not torch.equal(found[name], wanted) for name, wanted in expected.items())
    wide = [x.half() for x in (q, k, v)]
    at_level("amx")
    found = passes(*wide, None)
    at_level("avx512")
    expected = passes(*wide, None)
    assert all(torch.equal(found[name], wanted) for name, wanted in expected.items())
