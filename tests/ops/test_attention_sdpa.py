"""Where PyTorch's scaled_dot_product_attention is taken out and genkern.attention put in, nothing
else changes: values, gradients, shapes, layouts, and what both refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import genkern

B, H, N, M, D, DV = 2, 4, 9, 13, 8, 6
MASK_SHAPES = [(N, M), (1, M), (N, 1), (1, 1), (H, N, M), (1, N, M), (H, 1, M), (B, 1, N, M)]
MASK_SHAPES += [(B, H, N, M), (B, 1, 1, M), (1, H, 1, 1), (B, H, N, 1), (1, 1, N, M)]


def qkv(dtype=torch.float64, heads=H, key_heads=H):
    return [
        torch.randn(B, h, n, d, dtype=dtype, requires_grad=True)
        for h, n, d in ((heads, N, D), (key_heads, M, D), (key_heads, M, DV))
    ]


def both(tensors, mask=None, **options):
    """[out, gradients…] of genkern's, on the kernels, and of PyTorch's."""
    trained = [x for x in tensors if x.requires_grad]
    if isinstance(mask, torch.Tensor) and mask.requires_grad:
        trained.append(mask)
    found = []
    for function in (genkern.attention, F.scaled_dot_product_attention):
        with genkern.explain() as log:
            out = function(*tensors, attn_mask=mask, **options)
            weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
            grads = torch.autograd.grad((out * weights).sum(), trained) if trained else ()
        if function is genkern.attention:
            assert {choice.backend for choice in log} == {"cpu"}
        found.append([out, *grads])
    return found


def assert_same(tensors, mask=None, tolerance=1e-11, **options):
    for ours, theirs in zip(*both(tensors, mask, **options), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.1, 2])
def test_plain(scale, is_causal, cpu_level):
    assert_same(qkv(), scale=scale, is_causal=is_causal)
    assert_same(qkv(torch.float32), scale=scale, is_causal=is_causal, tolerance=1e-5)


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_that_broadcast(shape, cpu_level):
    assert_same(qkv(), torch.rand(shape) > 0.3)
    assert_same(qkv(), torch.randn(shape, dtype=torch.float64, requires_grad=True))
    strided = torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64)[..., ::2]
    assert_same(qkv(), strided.requires_grad_())


def test_rows_with_nothing_to_see(cpu_level, poisoned):
    mask = torch.rand(B, 1, N, M) > 0.5
    mask[:, :, 2] = False
    mask[1] = False
    for given in (
        mask,
        torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf),
    ):
        assert_same(qkv(), given)
        out = genkern.attention(*qkv(), attn_mask=given)
        assert not out[:, :, 2].any() and not out[1].any() and out[0, :, 3].all()


def test_causal_bias_objects(cpu_level):
    for bias in (causal_upper_left(N, M), causal_lower_right(N, M)):
        tensors = qkv()
        ours = genkern.attention(*tensors, attn_mask=bias)
        theirs = F.scaled_dot_product_attention(*tensors, attn_mask=bias)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads(key_heads, is_causal, cpu_level):
    assert_same(qkv(key_heads=key_heads), is_causal=is_causal, enable_gqa=True)
    mask = torch.randn(B, H, N, M, dtype=torch.float64, requires_grad=True)
    assert_same(qkv(key_heads=key_heads), mask, enable_gqa=True)


def normal(*size):
    return torch.randn(size, dtype=torch.float64)


LAYOUTS = {
    "heads inside": lambda h, n, d: normal(B, n, h, d).transpose(1, 2),
    "features outside": lambda h, n, d: normal(B, h, d, n).transpose(2, 3),
    "one batch for all": lambda h, n, d: normal(1, h, n, d).expand(B, h, n, d),
    "one head for all": lambda h, n, d: normal(B, 1, n, d).expand(B, h, n, d),
    "one row for all": lambda h, n, d: normal(B, h, 1, d).expand(B, h, n, d),
    "one number for all": lambda h, n, d: normal(1).expand(B, h, n, d),
    "every third row": lambda h, n, d: normal(B, h, 3 * n, d)[:, :, 1::3],
    "part of a projection": lambda h, n, d: (
        normal(B, n, 3 * h * d).chunk(3, -1)[1].unflatten(-1, (h, d)).transpose(1, 2)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, cpu_level, poisoned):
    make = LAYOUTS[layout]
    tensors = [make(H, n, d).requires_grad_() for n, d in ((N, D), (M, D), (M, DV))]
    assert_same(tensors, is_causal=True)
    assert_same(tensors, torch.rand(N, M) > 0.2)


def test_fewer_dimensions(cpu_level):
    for leading in ((), (3,), (2, 1, 3)):
        tensors = [normal(*leading, n, d) for n, d in ((N, D), (M, D), (M, DV))]
        assert_same([x.requires_grad_() for x in tensors])


@pytest.mark.parametrize("which", ["B", "H", "N", "M", "d", "dv"])
def test_nothing_there(which, cpu_level, poisoned):
    size = {"B": B, "H": H, "N": N, "M": M, "d": D, "dv": DV} | {which: 0}
    b, h, n, m, d, dv = size.values()
    tensors = [normal(b, h, r, c).requires_grad_() for r, c in ((n, d), (m, d), (m, dv))]
    for options in ({}, {"is_causal": True}):
        assert_same(tensors, scale=0.5, **options)


def refused(tensors, **options):
    """How the two refuse."""
    for function in (F.scaled_dot_product_attention, genkern.attention):
        with pytest.raises((RuntimeError, TypeError, ValueError)) as error:
            function(*tensors, **options)
    return error


def test_what_both_refuse():
    q, k, v = qkv()
    one = torch.randn(D, dtype=torch.float64)
    assert refused((one, one, one)).match("^attention: q must have at least two dimensions")
    assert refused((q, k.float(), v)).type is TypeError
    assert refused((q.long(), k.long(), v.long())).type is TypeError
    assert refused((q, k, v.to("meta"))).type is ValueError
    assert refused((q, k[..., :5], v)).type is ValueError
    assert refused((q, k, v[:, :, :5])).type is ValueError
    assert refused((q, k[:, :3], v[:, :3])).type is ValueError
    assert refused((q, k[:, :3], v[:, :3]), enable_gqa=True).type is ValueError
    assert refused((q, k, v), attn_mask=torch.ones(N, M, dtype=torch.int64)).type is TypeError
    assert refused((q, k, v), attn_mask=torch.ones(N, M + 1) > 0).type is ValueError
    assert refused((q, k, v), dropout_p=1.5).type is ValueError


def test_dropout_drops_as_many():
    """The same law, other draws: of an average of equal values, mean and spread over many rows."""
    q, k = torch.zeros(1, 1, 4000, 4), torch.zeros(1, 1, 64, 4)
    v = torch.ones(1, 1, 64, 1)
    for p in (0.1, 0.5):
        outs = [
            f(q, k, v, dropout_p=p) for f in (genkern.attention, F.scaled_dot_product_attention)
        ]
        spread = (p / (1 - p) / 64) ** 0.5
        for out in outs:
            assert abs(out.mean().item() - 1) < 5 * spread / 4000**0.5
            assert 0.95 < out.std().item() / spread < 1.05


def test_a_mask_and_is_causal_may_meet_here_only():
    tensors, mask = qkv(), torch.rand(N, M) > 0.2
    mask[:, 0] = True
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(*tensors, attn_mask=mask, is_causal=True)
    ours = genkern.attention(*tensors, attn_mask=mask, is_causal=True)
    theirs = F.scaled_dot_product_attention(*tensors, attn_mask=mask.tril())
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
