"""Attention in bf16 at the level amx where rows are long: weights that wait for one product, a
shift that is raised late, keys in spans, weights of two numbers."""

import pytest
import torch
import torch.nn.functional as F

import genkern
from genkern._native import native

pytestmark = pytest.mark.skipif(
    "amx" not in native.cpu_levels(), reason="this machine or build has no AMX"
)


@pytest.fixture
def amx():
    before = native.cpu_level()
    assert native.set_cpu_level("amx")
    yield
    native.set_cpu_level(before)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def results(function, tensors, tangents, cotangent, **options):
    """out, dq, dk, dv, tangent."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    grads = torch.autograd.grad(out, leaves, cotangent)
    tangent = torch.func.jvp(lambda *x: function(*x, **options), tensors, tangents)[1]
    return out.detach(), *grads, tangent


def assert_agree(tensors, tolerance=2**-6, **options):
    tangents = tuple(draw(*x.shape, seed=1) for x in tensors)
    cotangent = draw(*tensors[0].shape[:-1], tensors[2].shape[-1], seed=2)
    with genkern.explain() as log:
        found = results(genkern.attention, tensors, tangents, cotangent, **options)
    assert {choice.backend for choice in log} == {"cpu"}
    wide = [tuple(x.double() for x in part) for part in (tensors, tangents, (cotangent,))]
    with genkern.use_backend("reference"):
        expected = results(genkern.attention, wide[0], wide[1], wide[2][0], **options)
    names = ("out", "dq", "dk", "dv", "tangent")
    for name, got, wanted in zip(names, found, expected, strict=True):
        assert got.isfinite().all(), name
        assert (got - wanted).norm() <= tolerance * wanted.norm(), name


@pytest.mark.parametrize("N", [70, 300])
@pytest.mark.parametrize("M", [255, 257, 500, 1023, 1056, 1100, 2200])
def test_long_rows(N, M, amx, poisoned):
    assert_agree((draw(1, 2, N, 24), draw(1, 2, M, 24), draw(1, 2, M, 40)))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (300, 20)}])
def test_long_rows_that_see_some(options, amx, poisoned):
    N = 1300
    assert_agree((draw(1, 1, N, 32), draw(1, 1, N, 32), draw(1, 1, N, 32)), **options)


@pytest.mark.parametrize("heads", [1, 4, 8])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (200, 50)}])
def test_spans_of_one_task_or_of_several(heads, options, amx, poisoned):
    """Of 8 heads of keys each is one task with all spans, of fewer several tasks share a head. The
    last keys are nobody's, the last queries see no key."""
    k, v = draw(1, heads, 1400, 16), draw(1, heads, 1400, 16)
    lengths = {"key_lengths": torch.tensor([1190])}
    assert_agree((draw(1, 2 * heads, 1450, 16), k, v), enable_gqa=True, **lengths, **options)


@pytest.mark.parametrize("climb", [20.0, 300.0, -300.0])
def test_logits_that_climb(climb, amx, poisoned):
    """The maximum of a row comes last, far above the first tile's: the shift has to rise on the
    way, again and again; or it comes first, and the rest vanishes. Gradients that cancel against
    keys of 300 keep few digits (of eager's in bf16 none is left)."""
    M = 600
    q, k, v = draw(1, 1, 40, 16), draw(1, 1, M, 16), draw(1, 1, M, 16)
    q[..., 0], k[..., 0] = 4.0, torch.linspace(0, climb, M)
    assert_agree((q, k, v), tolerance=0.2 if climb > 100 else 2**-5)


def test_a_window_whose_first_keys_are_hidden(amx, poisoned):
    """Queries that see no key of their block's first tile get their shift later. Gradients cancel
    against keys of up to 1,000, as above."""
    q, k, v = draw(1, 1, 256, 16), draw(1, 1, 256, 16), draw(1, 1, 256, 16)
    k[..., 0] = -torch.arange(256.0) * 4
    q[..., 0] = 8.0
    assert_agree((q, k, v), tolerance=0.2, window=(10, 0))


@pytest.mark.parametrize(("N", "M"), [(1024, 256), (256, 1024)])
def test_values_of_another_width_are_as_exact_as_by_sdpa(N, M, amx):
    """SDPA computes SAGAN's blocks in fp32, and errs by the rounding of its output."""
    q, k, v = draw(2, 1, N, 24), draw(2, 1, M, 24), draw(2, 1, M, 96)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    ours = (genkern.attention(q, k, v) - exact).norm()
    theirs = (F.scaled_dot_product_attention(q, k, v) - exact).norm()
    assert ours <= 1.02 * theirs
