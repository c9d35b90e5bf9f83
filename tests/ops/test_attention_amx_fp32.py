"""Attention in fp32 at the level amx, where a float is split into three numbers of bf16: ragged
edges, what cannot be split, and who computes which shape. How exact it is, is asked with all levels
in test_attention_exact.py."""

import pytest
import torch
from attention_passes import passes

import genkern
from genkern._native import native

pytestmark = pytest.mark.skipif(
    "amx" not in native.cpu_levels(), reason="this machine or build has no AMX"
)


def tensors(N, M, d, dv):
    return torch.randn(1, 2, N, d), torch.randn(1, 2, M, d), torch.randn(1, 2, M, dv)


def at_both(at_level, q, k, v, bias=None, **options):
    """What tiles give, and what fused multiply-adds give."""
    at_level("amx")
    found = passes(q, k, v, bias, **options)
    at_level("avx512")
    return found, passes(q, k, v, bias, **options)


@pytest.mark.parametrize("N", [64, 94, 127, 193])
@pytest.mark.parametrize(
    ("M", "d", "dv"), [(64, 24, 25), (95, 33, 40), (190, 64, 96), (225, 25, 65)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_ragged_edges_agree_with_the_level_below(N, M, d, dv, is_causal, at_level, poisoned):
    found, expected = at_both(at_level, *tensors(N, M, d, dv), is_causal=is_causal)
    for name, wanted in expected.items():
        assert not torch.equal(found[name], wanted), f"{name}: tiles did not compute"
        error = (found[name] - wanted).abs().max()
        assert error <= 2e-6 * max(1, wanted.abs().max()), name


def test_lanes_of_no_query_let_nothing_through(at_level, poisoned):
    """Far above what exp can take: those lanes hold infinities."""
    bias = torch.full((1, 1, 1, 125), 200.0)
    found, expected = at_both(at_level, *tensors(84, 125, 32, 32), bias)
    for name, wanted in expected.items():
        assert (found[name] - wanted).abs().max() <= 2e-5 * max(1, wanted.abs().max()), name


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 3e38, 1e-40])
@pytest.mark.parametrize("which", range(3))
def test_numbers_that_cannot_be_split(bad, which, at_level):
    """Infinities go where fused multiply-adds send them, in all passes, because those compute the
    call; the largest and the smallest numbers stay what they are."""
    qkv = tensors(90, 125, 24, 24)
    qkv[which][0, 1, 70, 2] = bad
    found, expected = at_both(at_level, *qkv)
    for name, wanted in expected.items():
        assert torch.equal(found[name].isfinite(), wanted.isfinite()), name
        if bad in (float("inf"), float("-inf")):
            assert torch.equal(found[name].nan_to_num(7), wanted.nan_to_num(7)), name


def test_a_hidden_infinity_is_not_seen(at_level):
    q, k, v = tensors(85, 125, 24, 24)
    v[:, :, 90:] = float("inf")
    found, expected = at_both(at_level, q, k, v, is_causal=True)
    assert found["out"].isfinite().all() and torch.equal(found["out"], expected["out"])


def test_weights_next_to_zero(at_level):
    """Pieces of a weight near the smallest normal number are subnormal, and must not run into their
    neighbours."""
    q, k, v = tensors(64, 125, 24, 24)
    for factor in (16, 18, 20, 22, 24):
        found, expected = at_both(at_level, q * factor, k * factor, v)
        assert found["out"].isfinite().all()
        assert (found["out"] - expected["out"]).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("N", "M", "d", "dv"),
    [(63, 200, 32, 32), (200, 63, 32, 32), (99, 99, 23, 64), (65, 65, 32, 32), (96, 97, 64, 64)],
)
def test_shapes_that_are_not_split(N, M, d, dv, at_level):
    found, expected = at_both(at_level, *tensors(N, M, d, dv))
    assert all(torch.equal(found[name], wanted) for name, wanted in expected.items())


@pytest.mark.parametrize("options", [{"scale": -0.3}, {"softcap": 5.0}, {"window": (20, 9)}])
def test_options_agree_with_the_level_below(options, at_level):
    found, expected = at_both(at_level, *tensors(90, 125, 24, 40), **options)
    for name, wanted in expected.items():
        assert (found[name] - wanted).abs().max() <= 5e-6 * max(1, wanted.abs().max()), name


def test_results_do_not_depend_on_threads(at_level):
    at_level("amx")
    q, k, v = (torch.randn(2, 2, 400, 32) for _ in range(3))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(passes(q, k, v, None))
    finally:
        torch.set_num_threads(before)
    for name, first in found[0].items():
        assert all(torch.equal(first, other[name]) for other in found[1:]), name


def test_the_tiles_answer_under_a_mask(at_level):
    """Hidden keys are -inf in the logits, which must not count as an infinity that was met."""
    found, expected = at_both(at_level, *tensors(128, 128, 32, 32), is_causal=True)
    assert all(not torch.equal(found[name], wanted) for name, wanted in expected.items())
    with genkern.explain() as log:
        at_level("amx")
        genkern.attention(*tensors(128, 128, 32, 32))
    assert [choice.backend for choice in log] == ["cpu"]
