"""Attention: what is said of bad arguments, and PyTorch's meaning of good ones."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import genkern

SHAPES = {"q": (2, 4, 5, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 6)}


def qkv(dtype=torch.float32, **shapes):
    return [torch.randn(shapes.get(name, shape)).to(dtype) for name, shape in SHAPES.items()]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": (4,)}, r"q must have at least two dimensions, \[..., rows, features\], not \(4,\)"),
        (
            {"k": (3, 4, 7, 8)},
            r"k must have leading dimensions that broadcast with q's, \(2, 4\), and k's; its batch "
            r"is \(3,\), not \(2,\)",
        ),
        (
            {"v": (2, 2, 7, 6)},
            r"v must have q's number of heads, 4, or 1, not 2 \(or pass enable_gqa=True\)",
        ),
        ({"k": (2, 3, 7, 8)}, "k must have q's number of heads, 4, or 1, not 3"),
        ({"k": (2, 4, 7, 3)}, "k must have as many features as q, 8, not 3"),
        ({"v": (2, 4, 8, 6)}, "v must have one row for each key, 7, not 8"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=f"^attention: {message}$"):
        genkern.attention(*qkv(**shapes))


BAD = [
    ({"scale": "1"}, TypeError, "scale must be a number or None, not str"),
    ({"scale": float("nan")}, ValueError, "scale must be finite, not nan"),
    ({"dropout_p": "x"}, TypeError, "dropout_p must be a number, not str"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, not 1.5"),
    ({"dropout_p": -0.5}, ValueError, "dropout_p must be between 0 and 1, not -0.5"),
    ({"softcap": "x"}, TypeError, "softcap must be a number or None, not str"),
    ({"softcap": 0}, ValueError, "softcap must be positive and finite, not 0"),
    ({"softcap": float("inf")}, ValueError, "softcap must be positive and finite, not inf"),
    ({"window": 3}, TypeError, r"window must be a pair \(left, right\) or None, not 3"),
    (
        {"window": (1, 2, 3)},
        TypeError,
        r"window must be a pair \(left, right\) or None, not \(1, 2, 3\)",
    ),
    ({"window": (1.5, 2)}, TypeError, "window must hold integers or None, not float"),
    (
        {"window": (1, -2)},
        ValueError,
        "window must hold numbers of keys, None or -1 for no bound, not -2",
    ),
    (
        {"alignment": "middle"},
        ValueError,
        "alignment must be 'upper_left' or 'lower_right', not 'middle'",
    ),
    ({"similarity": "cosine"}, ValueError, "similarity must be 'dot' or 'l2', not 'cosine'"),
    (
        {"similarity": "l2", "softcap": 3.0},
        ValueError,
        "softcap must be None with similarity='l2', whose distances have no upper bound to cap, "
        "not 3.0",
    ),
    ({"attn_mask": [1]}, TypeError, "attn_mask must be a tensor or None, not list"),
    (
        {"attn_mask": torch.ones(5, 7, dtype=torch.int64)},
        TypeError,
        "attn_mask must be boolean or have q's dtype, torch.float32, not torch.int64",
    ),
    (
        {"attn_mask": torch.ones(5, 7, device="meta")},
        ValueError,
        "attn_mask must be on q's device, cpu, not meta",
    ),
    (
        {"attn_mask": torch.ones(3, 1, 5, 7)},
        ValueError,
        r"attn_mask must broadcast to \(2, 4, 5, 7\), not have the shape \(3, 1, 5, 7\)",
    ),
    (
        {"attn_mask": torch.ones(1, 2, 4, 5, 7)},
        ValueError,
        r"attn_mask must broadcast to \(2, 4, 5, 7\), not have the shape \(1, 2, 4, 5, 7\)",
    ),
    (
        {"attn_mask": causal_upper_left(5, 6)},
        ValueError,
        "attn_mask must be a CausalBias for 5 queries and 7 keys, not 5 and 6",
    ),
    ({"key_lengths": [3, 4]}, TypeError, "key_lengths must be a tensor of integers, not list"),
    (
        {"key_lengths": torch.ones(2)},
        TypeError,
        "key_lengths must be of dtype int32 or int64, not torch.float32",
    ),
    (
        {"key_lengths": torch.ones(3, dtype=torch.int64)},
        ValueError,
        r"key_lengths must broadcast to q's leading dimensions without heads, \(2,\), not have "
        r"the shape \(3,\)",
    ),
    (
        {"key_lengths": torch.tensor([3, 8])},
        ValueError,
        "key_lengths must lie between 0 and the number of keys, 7, not hold 8",
    ),
    (
        {"key_lengths": torch.tensor([-1, 3])},
        ValueError,
        "key_lengths must lie between 0 and the number of keys, 7, not hold -1",
    ),
    (
        {"key_lengths": torch.tensor([1, 3], device="meta")},
        ValueError,
        "key_lengths must be on q's device, cpu, not meta",
    ),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_options_that_do_not_fit(options, kind, message, backend):
    with genkern.use_backend(backend), pytest.raises(kind, match=f"^attention: {message}$"):
        genkern.attention(*qkv(), **options)


def test_tensors_of_the_wrong_kind():
    q, k, v = qkv()
    with pytest.raises(TypeError, match=r"^attention: k must be a tensor, not list$"):
        genkern.attention(q, k.tolist(), v)
    with pytest.raises(TypeError, match=r"^attention: v must have q's dtype, torch.float32, not"):
        genkern.attention(q, k, v.double())
    with pytest.raises(TypeError, match=r"^attention: q must be of a floating-point dtype, not"):
        genkern.attention(q.long(), k, v)
    with pytest.raises(ValueError, match=r"^attention: v must be on q's device, cpu, not meta$"):
        genkern.attention(q, k, v.to("meta"))
    with pytest.raises(TypeError, match=r"takes from 3 to 6 positional arguments"):
        genkern.attention(q, k, v, None, 0.0, False, 1.0)
    with pytest.raises(TypeError, match=r"torch.bfloat16, or torch.float32, not torch.float64$"):
        genkern.attention(*qkv(torch.bfloat16), attn_mask=torch.ones(5, 7).double())


def test_heads_that_do_not_group():
    with pytest.raises(ValueError, match="k must have a number of heads that divides q's, 4, with"):
        genkern.attention(*qkv(k=(2, 3, 7, 8), v=(2, 3, 7, 6)), enable_gqa=True)
    with pytest.raises(ValueError, match="v must have k's number of heads, 2, not 4"):
        genkern.attention(*qkv(k=(2, 2, 7, 8)), enable_gqa=True)


STARTS = torch.tensor([0, 2, 5])
BAD_VARLEN = [
    ({"q": (1, 5, 2, 4)}, {}, ValueError, r"q must have three dimensions, \[tokens, heads, feat"),
    ({"k": (5, 2, 3)}, {}, ValueError, "k must have as many features as q, 4, not 3"),
    ({"v": (6, 2, 3)}, {}, ValueError, "v must have one row for each key, 5, not 6"),
    ({"k": (5, 1, 4), "v": (5, 1, 3)}, {}, ValueError, "k must have q's number of heads, 2, not 1"),
    ({"v": (5, 1, 3)}, {}, ValueError, "v must have k's number of heads, 2, not 1"),
    ({}, {"cu_seqlens_q": [0, 5]}, TypeError, "cu_seqlens_q must be a tensor of integers"),
    ({}, {"cu_seqlens_k": STARTS.float()}, TypeError, "cu_seqlens_k must be of dtype int32 or"),
    ({}, {"cu_seqlens_k": STARTS[None]}, ValueError, r"cu_seqlens_k must have one dimension, \["),
    ({}, {"cu_seqlens_k": STARTS[1:]}, ValueError, "cu_seqlens_k must be as long as cu_seqlens_q"),
    ({}, {"cu_seqlens_q": STARTS + 1}, ValueError, "cu_seqlens_q must begin with 0, not 1"),
    (
        {},
        {"cu_seqlens_q": torch.tensor([0, 2, 4])},
        ValueError,
        "cu_seqlens_q must end with the number of rows, 5, not 4",
    ),
    (
        {},
        {"cu_seqlens_q": torch.tensor([0, 7, 5])},
        ValueError,
        r"cu_seqlens_q must not decrease, but holds \[0, 7, 5\]",
    ),
    ({}, {"max_seqlen_q": 2}, ValueError, "max_seqlen_q must be at least the longest sequence, 3"),
    ({}, {"max_seqlen_k": 2.5}, TypeError, "max_seqlen_k must be an integer or None, not float"),
    ({}, {"max_seqlen_k": -1}, ValueError, "max_seqlen_k must not be negative, but is -1"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("shapes", "options", "kind", "message"), BAD_VARLEN)
def test_sequences_that_do_not_fit(shapes, options, kind, message, backend):
    shapes = {"q": (5, 2, 4), "k": (5, 2, 4), "v": (5, 2, 3), **shapes}
    tensors = [torch.randn(shape) for shape in shapes.values()]
    options = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, **options}
    with genkern.use_backend(backend), pytest.raises(kind, match=f"^attention: {message}"):
        genkern.attention_varlen(*tensors, **options)


def test_alibi():
    bias = genkern.alibi(8, 3, 5, alignment="lower_right", dtype=torch.float64)
    slope = torch.tensor([2.0**-h for h in range(1, 9)], dtype=torch.float64)
    place = torch.arange(5.0) - torch.arange(3.0)[:, None] - 2
    torch.testing.assert_close(bias, slope[:, None, None] * place)
    # Six heads: those of four, then the first and the third of eight.
    expected = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    torch.testing.assert_close(genkern.alibi(6, 2)[:, 0, 1], expected)
    slopes = torch.ones(2, requires_grad=True)
    genkern.alibi(2, 3, slopes=slopes)[1, 2, 0].backward()
    assert slopes.grad.tolist() == [0, -2]
    assert genkern.alibi(0, 3).shape == (0, 3, 3)
    with pytest.raises(ValueError, match="alibi: alignment must be 'upper_left' or"):
        genkern.alibi(2, 3, alignment="middle")
    with pytest.raises(ValueError, match=r"alibi: slopes must have the shape \(2,\), not \(3,\)"):
        genkern.alibi(2, 3, slopes=[1, 2, 3])
    with pytest.raises(ValueError, match="alibi: heads, N and M must not be negative"):
        genkern.alibi(2, -3)


# ---- As PyTorch means it ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sdpa_means_the_same(backend):
    q, k, v = qkv()
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[0, 0, 2] = False
    with genkern.use_backend(backend), genkern.explain() as log:
        for options in (
            {},
            {"is_causal": True},
            {"scale": 0.3},
            {"attn_mask": mask},
            {"attn_mask": torch.randn(4, 1, 7)},
            {"attn_mask": torch.randn(1, 7)},
            {"attn_mask": causal_lower_right(5, 7)},
            {"attn_mask": causal_upper_left(5, 7)},
        ):
            expected = F.scaled_dot_product_attention(q, k, v, **options)
            got = genkern.attention(q, k, v, **options)
            torch.testing.assert_close(got, expected.nan_to_num(0.0), rtol=1e-5, atol=1e-5)
        few = k[:, :2], v[:, :2]
        expected = F.scaled_dot_product_attention(q, *few, enable_gqa=True)
        torch.testing.assert_close(genkern.attention(q, *few, enable_gqa=True), expected)
    assert {choice.backend for choice in log} == {backend}


LEADING = [
    ((2, 4), (2, 4), (2, 4)),
    ((), (3, 2), (3, 2)),
    ((3, 2), (), (2,)),
    ((2, 1, 4), (1, 3, 4), (4,)),
    ((2, 4), (2, 1), (1, 1)),
    ((), (), ()),
    ((3,), (3,), (1,)),
]


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_leading_dimensions_broadcast(leading, cpu_level):
    sizes = (5, 8), (7, 8), (7, 6)
    x = [torch.randn(*a, *s, requires_grad=True) for a, s in zip(leading, sizes, strict=True)]
    full = torch.broadcast_shapes(*leading)
    wide = [t.expand(*full, *s) for t, s in zip(x, sizes, strict=True)]
    mask = torch.randn(*full[:-1], *full[-1:], 5, 7, requires_grad=True)
    expected = (wide[0] @ wide[1].mT / 8**0.5 + mask).softmax(-1) @ wide[2]
    got = genkern.attention(*x, mask)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(got)
    for g, e in zip(
        torch.autograd.grad(got, [*x, mask], cotangent),
        torch.autograd.grad(expected, [*x, mask], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
