"""Attention's short way (genkern/ops/attention/plans.py): who takes it, and that it is the long way
in every bit."""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad

import genkern
from genkern.ops._tensors import ARITHMETIC
from genkern.ops.attention import plans

# (q's, k's and v's shapes, options)
KINDS = {
    "one": ([(1, 1, 1, 1)] * 3, {}),
    "ragged": ([(2, 3, 5, 7), (2, 3, 9, 7), (2, 3, 9, 4)], {}),
    "causal": ([(2, 2, 70, 16)] * 3, {"is_causal": True}),
    "scale": ([(1, 2, 17, 24)] * 3, {"scale": -0.3}),
    "grouped heads": ([(2, 4, 20, 8), (2, 2, 30, 8), (2, 2, 30, 8)], {"enable_gqa": True}),
    "many keys": ([(1, 1, 130, 32), (1, 1, 400, 32), (1, 1, 400, 96)], {}),
    "boolean mask": ([(2, 3, 9, 8)] * 3, {"attn_mask": torch.randn(2, 1, 9, 9) > 0}),
    "boolean mask of keys": ([(2, 3, 9, 8)] * 3, {"attn_mask": torch.randn(2, 1, 1, 9) > 0}),
    "added mask": ([(2, 3, 9, 8)] * 3, {"attn_mask": torch.randn(3, 9, 9), "is_causal": True}),
    "mask of keys": ([(2, 3, 9, 8)] * 3, {"attn_mask": torch.randn(2, 1, 1, 9)}),
    "no queries": ([(2, 1, 0, 8), (2, 1, 5, 8), (2, 1, 5, 8)], {}),
    "no keys": ([(2, 1, 5, 8), (2, 1, 0, 8), (2, 1, 0, 8)], {}),
    "no heads": ([(2, 0, 5, 8)] * 3, {}),
}
LAYOUTS = {
    "contiguous": lambda shape: torch.randn(shape),
    "heads inside": lambda shape: torch.randn([shape[i] for i in (0, 2, 1, 3)]).transpose(1, 2),
    "apart": lambda shape: torch.randn(*shape[:3], shape[3] + 3)[..., : shape[3]],
    "one row for all": lambda shape: torch.randn(*shape[:2], 1, shape[3]).expand(shape),
}
QKV = [(2, 2, 6, 4)] * 3


@pytest.fixture(autouse=True)
def no_plans():
    plans._plans.clear()


@contextlib.contextmanager
def count(monkeypatch):
    """The names of the short way's launches."""
    launched = []

    class Spy:
        def __init__(self, *args):
            self.plan = real(*args)

        def forward(self, *args):
            launched.append("forward")
            self.plan.forward(*args)

        def backward(self, *args):
            launched.append("backward")
            self.plan.backward(*args)

    real = plans.native.AttentionPlan
    with monkeypatch.context() as patch:
        patch.setattr(plans.native, "AttentionPlan", Spy)
        yield launched


def results(qkv, cotangent, **options):
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = genkern.attention(*qkv, **options)
    return out, *torch.autograd.grad(out, qkv, cotangent.expand(out.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shapes, options", KINDS.values(), ids=KINDS)
def test_it_is_the_long_way(shapes, options, layout, dtype, poisoned, cpu_level, monkeypatch):
    qkv = [layout(shape).to(dtype) for shape in shapes]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():  # of a dtype that needs no copy
        options = {**options, "attn_mask": mask.to(ARITHMETIC[dtype])}
    with monkeypatch.context() as patch:
        patch.setattr(plans, "attention", lambda *args: None)
        plain = genkern.attention(*qkv, **options)
        cotangent = torch.randn(plain.shape).to(dtype)
        cotangent = torch.empty_strided(plain.shape, plain.stride(), dtype=dtype).copy_(cotangent)
        expected = results(qkv, cotangent, **options)
    with count(monkeypatch) as launched, genkern.explain() as log:
        for _ in range(2):  # the first makes the plan
            got = results(qkv, cotangent, **options)
            for mine, its in zip(got, expected, strict=True):
                assert torch.equal(mine, its) and mine.stride() == its.stride()
        without_gradients = genkern.attention(*qkv, **options)
    assert torch.equal(without_gradients, plain) and without_gradients.stride() == plain.stride()
    assert launched == ["forward", "backward"] * 2 + ["forward"]
    assert [str(choice) for choice in log[:2]] == [
        "attention: cpu (the tensors' device)",
        "attention.backward: cpu (the forward ran there)",
    ]


def long_ways():
    q, k, v = (torch.randn(s) for s in QKV)
    backwards = torch.randn(2, 2, 4, 6).transpose(2, 3)
    yield "mask with a gradient", (q, k, v), {"attn_mask": torch.randn(6, 6, requires_grad=True)}
    yield "mask to be copied", (q, k, v), {"attn_mask": torch.randn(2, 1, 1, 12)[..., ::2]}
    yield (
        "negated mask",
        (q, k, v),
        {"attn_mask": torch.randn(6, 6, dtype=torch.cfloat).conj().imag},
    )
    yield "lengths", (q, k, v), {"key_lengths": torch.tensor([3, 6])}
    yield "window", (q, k, v), {"window": (1, 1)}
    yield "softcap", (q, k, v), {"softcap": 5.0}
    yield "dropout", (q, k, v), {"dropout_p": 0.5}
    yield "lower right", (q, k, v), {"alignment": "lower_right", "is_causal": True}
    yield "distances", (q, k, v), {"similarity": "l2"}
    yield "lse", (q, k, v), {"return_lse": True}
    yield "features apart", (backwards, k, v), {}
    yield "negated", (torch.complex(q, q).conj().imag, k, v), {}
    yield "three dimensions", (q[0], k[0], v[0]), {}
    yield "broadcast", (q, k[:1], v[:1]), {}


@pytest.mark.parametrize(
    "qkv, options", [x[1:] for x in long_ways()], ids=[x[0] for x in long_ways()]
)
def test_others_go_the_long_way(qkv, options, monkeypatch):
    with count(monkeypatch) as launched:
        genkern.attention(*(torch.randn(s) for s in QKV))  # a plan for these shapes is there
        genkern.attention(*qkv, **options)
    assert launched == ["forward"]


def test_other_modes_go_the_long_way(monkeypatch):
    q, k, v = (torch.randn(s) for s in QKV)
    with count(monkeypatch) as launched:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert genkern.attention(q, k, v).dtype == torch.bfloat16
        with genkern.use_backend("reference"), genkern.explain() as log:
            genkern.attention(q, k, v)
        assert log[0].backend == "reference"
        torch.func.vmap(genkern.attention)(q[None], k[None], v[None])
        torch.func.grad(lambda q: genkern.attention(q, k, v).sum())(q)
        with forward_ad.dual_level():
            out = genkern.attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
            assert forward_ad.unpack_dual(out).tangent is not None
        assert genkern.attention(*(x.to("meta") for x in (q, k, v))).is_meta
    assert launched == []


def test_autocast_with_nothing_to_cast(monkeypatch):
    qkv = [torch.randn(s, dtype=torch.bfloat16) for s in QKV]
    mask = torch.ones(6, 6, dtype=torch.bool)
    with count(monkeypatch) as launched, torch.autocast("cpu", dtype=torch.bfloat16):
        got = genkern.attention(*qkv), genkern.attention(*qkv, mask)
        genkern.attention(qkv[0].float(), *qkv[1:])
        genkern.attention(*qkv, torch.zeros(6, 6))
    assert launched == ["forward"] * 2
    assert torch.equal(got[0], got[1]) and got[0].dtype == torch.bfloat16


def test_asked_for(monkeypatch):
    with count(monkeypatch) as launched, genkern.use_backend("cpu"), genkern.explain() as log:
        genkern.attention(*(torch.randn(s) for s in QKV))
    assert launched == ["forward"] and str(log[0]) == "attention: cpu (asked for)"


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_some_gradients(wanted, poisoned, monkeypatch):
    qkv = [torch.nn.Parameter(torch.randn(2, 2, 40, 16), i in wanted) for i in range(3)]
    with count(monkeypatch) as launched:
        genkern.attention(*qkv).backward(torch.ones(2, 2, 40, 16))
    assert launched == ["forward", "backward"]
    everything = results(qkv, torch.ones(()).expand(2, 2, 40, 16))[1:]
    for i, (x, grad) in enumerate(zip(qkv, everything, strict=True)):
        assert x.grad is None if i not in wanted else torch.equal(x.grad, grad)


def test_gradients_laid_out_otherwise(monkeypatch):
    """Of a sum's gradient, whose strides are zero, and of transposed ones."""
    qkv = [torch.randn(s) for s in QKV]
    heads_inside = torch.randn(2, 6, 2, 4).transpose(1, 2)
    for cotangent in (torch.ones(()), torch.randn(2, 2, 4, 6).transpose(2, 3), heads_inside):
        whole = cotangent.expand(QKV[0]).contiguous()
        with count(monkeypatch) as launched:
            got, expected = results(qkv, cotangent), results(qkv, whole)
        assert launched == ["forward", "backward"] * 2
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
        plans._plans.clear()


@pytest.mark.parametrize(
    "options",
    [{}, {"attn_mask": torch.randn(6, 6)}, {"softcap": 5.0}],
    ids=["short", "short with a mask", "long"],
)
def test_hooks_that_move_saved_tensors(options, monkeypatch):
    """Unpacked with other strides, they are read by these, on either way."""
    qkv = [torch.randn(s) for s in QKV]
    cotangent = torch.randn(QKV[0])
    expected = results(qkv, cotangent, **options)

    def elsewhere(x):
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)

    plans._plans.clear()
    with (
        count(monkeypatch) as launched,
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, elsewhere),
    ):
        got = results(qkv, cotangent, **options)
    assert launched == ([] if "softcap" in options else ["forward"])
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("mask", [None, torch.ones(5, 5).tril().bool(), torch.randn(1, 1, 1, 5)])
def test_twice_differentiable(mask):
    qkv = [torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    assert torch.autograd.gradcheck(genkern.attention, (*qkv, mask))
    assert torch.autograd.gradgradcheck(genkern.attention, (*qkv, mask))


def test_a_changed_input_is_noticed():
    q, k, v = (torch.randn(s, requires_grad=True) for s in QKV)
    inner = k * 1
    out = genkern.attention(q, inner, v)
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(torch.ones_like(out))


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 3)
    for rows in range(1, 9):
        genkern.attention(*(torch.randn(1, 1, rows, 4) for _ in range(3)))
        assert len(plans._plans) <= 3


def test_bad_arguments_are_named_again():
    """A call that fails does so the second time too."""
    q, k, v = (torch.randn(s) for s in QKV)
    for _ in range(2):
        with pytest.raises(ValueError, match="attn_mask must broadcast"):
            genkern.attention(q, k, v, torch.ones(5, 5, dtype=torch.bool))
        with pytest.raises(TypeError, match="attn_mask must be a tensor"):
            genkern.attention(q, k, v, [1.0])
        with pytest.raises(ValueError, match="k must have as many features as q"):
            genkern.attention(q, k[..., :2], v)
        with pytest.raises(TypeError, match="v must have q's dtype"):
            genkern.attention(q, k, v.half())
        with pytest.raises(ValueError, match="scale must be finite"):
            genkern.attention(q, k, v, scale=float("inf"))
