"""Attention in Triton where rows begin at no multiples of 16: on sm_90 and sm_100 the tiles must be
small (triton/call.py says why). What they compute is of test_attention.py."""

import pytest
import torch

import genkern
from genkern import use_backend
from genkern.ops import _triton


def uneven(features, by=1):
    return torch.randn(1, 2, 70, features + by).bfloat16()[..., :features]


@pytest.mark.parametrize(
    ("target", "d", "dv", "largest"),
    [
        ("sm_90", uneven(64), uneven(8), 32),
        ("sm_100", uneven(20, 0), uneven(12, 0), 32),
        ("sm_90", uneven(24, 0), uneven(96, 0), None),  # rows of v are even
        ("sm_80", uneven(64), uneven(8), None),
        ("sm_120", uneven(64), uneven(8), None),
    ],
)
def test_tiles(target, d, dv, largest):
    with use_backend("triton"), _triton.recording(target) as launches:
        out = genkern.attention(d.requires_grad_(), d, dv)
        torch.autograd.grad(out.sum(), d)
    assert len(launches) == 3
    for launch in launches:
        tile = max(launch.options["QUERIES"], launch.options["KEYS"])
        assert tile <= largest if largest else tile > 32
