"""Attention: every derivative of every mix of features, on the CPU kernels at every level."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genkern

FEATURES = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        "groups": st.integers(1, 2),
        "key_heads": st.integers(1, 2),
        "N": st.integers(1, 5),
        "M": st.integers(1, 6),
        "d": st.integers(1, 3),
        "dv": st.integers(1, 3),
        "is_causal": st.booleans(),
        "alignment": st.sampled_from(["upper_left", "lower_right"]),
        "window": st.none() | st.tuples(*[st.none() | st.integers(0, 3)] * 2),
        "capped": st.booleans(),
        "similarity": st.sampled_from(["dot", "dot", "l2"]),
        "mask": st.sampled_from(["none", "key", "boolean", "float"]),
        "mask_broadcasts": st.tuples(*[st.booleans()] * 4),
        "lengths": st.booleans(),
        "dropout_p": st.sampled_from([0.0, 0.0, 0.4]),
        "return_lse": st.booleans(),
        "scale": st.sampled_from([None, 0.7, -0.5, 0.0]),
        "seed": st.integers(0, 2**31),
    }
)


def problem(f):
    """(inputs that want gradients, function) of the drawn features."""
    torch.manual_seed(f["seed"])
    B, N, M = f["B"], f["N"], f["M"]
    H = f["groups"] * f["key_heads"]
    shapes = [(B, H, N, f["d"]), (B, f["key_heads"], M, f["d"]), (B, f["key_heads"], M, f["dv"])]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    full = [1 if one else n for one, n in zip(f["mask_broadcasts"], (B, H, N, M), strict=True)]
    mask = None
    if f["mask"] == "key":
        inputs.append(torch.randn(full[0], 1, 1, M, dtype=torch.float64, requires_grad=True))
    elif f["mask"] == "float":
        inputs.append(torch.randn(full, dtype=torch.float64, requires_grad=True))
    elif f["mask"] == "boolean":
        mask = torch.rand(full) > 0.3
    options = {
        name: f[name]
        for name in ("is_causal", "alignment", "window", "dropout_p", "similarity", "scale")
    }
    if f["capped"] and f["similarity"] == "dot":
        options["softcap"] = 1.5
    if f["lengths"]:
        options["key_lengths"] = torch.randint(0, M + 1, (B,))

    def call(q, k, v, bias=mask):
        torch.manual_seed(f["seed"])
        found = genkern.attention(
            q, k, v, bias, enable_gqa=True, return_lse=f["return_lse"], **options
        )
        # A row that sees nothing has lse = -inf, which no difference quotient likes.
        return (found[0], found[1].nan_to_num(0, 0, 0)) if f["return_lse"] else found

    return inputs, call


def results(inputs, call):
    """The values, and the first and second derivatives in both modes; forward mode with the values
    in one kernel, and, because the inputs are watched, alone."""
    outputs = call(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(0)

    def like(tensors):
        return [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in tensors]

    cotangents = [x.requires_grad_() for x in like(outputs)]
    grads = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True)
    tangents = like(inputs)
    seconds = torch.autograd.grad(
        grads, [*inputs, *cotangents], tangents, allow_unused=True, materialize_grads=True
    )
    forward_mode = (
        *torch.func.jvp(call, tuple(x.detach() for x in inputs), tuple(tangents)),
        *torch.func.jvp(call, tuple(inputs), tuple(tangents)),
    )
    forward_mode = [y for x in forward_mode for y in (x if isinstance(x, tuple) else (x,))]
    return [*outputs, *grads, *seconds, *forward_mode]


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(FEATURES)
def test_every_derivative_is_the_references(cpu_level, poisoned, features):
    inputs, call = problem(features)
    with genkern.explain() as log:
        got = results(inputs, call)
    assert {choice.backend for choice in log} == {"cpu"}
    ran = {choice.op for choice in log}
    assert ran == {"attention", *(f"attention.{x}" for x in ("backward", "second", "jvp"))}
    with genkern.use_backend("reference"):
        expected = results(inputs, call)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape and g.isfinite().all()
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(FEATURES)
def test_gradcheck_twice(cpu_level, features):
    inputs, call = problem(features)
    with genkern.explain() as log:
        assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(
            call, inputs, check_fwd_over_rev=True, fast_mode=True, atol=1e-4
        )
    assert {choice.backend for choice in log} == {"cpu"}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sequences_one_after_another(is_causal, dropout_p, cpu_level, poisoned):
    """Each as if it were alone: an empty one, one without queries, one without keys."""
    q_lengths, k_lengths = [3, 0, 0, 70, 2, 5], [4, 0, 3, 80, 0, 1]
    starts = [torch.tensor([0, *x]).cumsum(0).int() for x in (q_lengths, k_lengths)]
    shapes = [(sum(q_lengths), 4, 3), (sum(k_lengths), 2, 3), (sum(k_lengths), 2, 5)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def together(*x):
        torch.manual_seed(5)
        out, lse = genkern.attention_varlen(
            *x,
            *starts,
            enable_gqa=True,
            is_causal=is_causal,
            alignment="lower_right",
            window=(30, None),
            dropout_p=dropout_p,
            return_lse=True,
        )
        return out, lse.nan_to_num(0, 0, 0)

    with genkern.explain() as log:
        got = results(inputs, together)
    assert {choice.backend for choice in log} == {"cpu"}
    with genkern.use_backend("reference"):
        expected = results(inputs, together)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)
    if dropout_p == 0:
        alone = [
            genkern.attention(
                *(x[a[i] : a[i + 1]].transpose(0, 1) for x, a in zip(inputs, places, strict=True)),
                enable_gqa=True,
                is_causal=is_causal,
                alignment="lower_right",
                window=(30, None),
            ).transpose(0, 1)
            for i, places in ((i, (starts[0], starts[1], starts[1])) for i in range(6))
        ]
        torch.testing.assert_close(got[0], torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mask_of_either_dtype(dtype, cpu_level, poisoned):
    """Its gradient is of its own dtype and shape."""
    q, k, v = (torch.randn(2, 4, n, 8, dtype=dtype) for n in (5, 7, 7))
    for mask_dtype in {dtype, torch.float32}:
        for shape in ((5, 7), (2, 1, 5, 1), (4, 1, 7), (2, 1, 1, 7), (1, 7), (1, 1), (2, 4, 5, 7)):
            mask = torch.randn(shape, dtype=mask_dtype, requires_grad=True)
            (got,) = torch.autograd.grad(genkern.attention(q, k, v, mask).float().sum(), mask)
            wide = mask.detach().double().requires_grad_()
            out = genkern.attention(*(x.double() for x in (q, k, v)), wide)
            (expected,) = torch.autograd.grad(out.sum(), wide)
            assert got.dtype == mask_dtype and got.shape == shape
            tolerance = 1e-5 if mask_dtype == torch.float32 else 2e-2
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_hidden_by_minus_infinity(cpu_level, poisoned):
    """As by a boolean mask, without a NaN in any derivative; rows that see nothing are zeros."""
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    seen = torch.rand(5, 7) > 0.4
    seen[2] = False
    floating = torch.zeros(5, 7, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    by_number = results([q, k, v], lambda *x: genkern.attention(*x, floating))
    by_boolean = results([q, k, v], lambda *x: genkern.attention(*x, seen))
    for a, b in zip(by_number, by_boolean, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)
    assert (by_number[0][:, :, 2] == 0).all() and (by_number[1][:, :, 2] == 0).all()
    trained = floating.requires_grad_()
    out, lse = genkern.attention(q, k, v, trained, return_lse=True)
    assert (lse[:, :, 2] == -torch.inf).all()
    (grad,) = torch.autograd.grad(out.square().sum(), trained, create_graph=True)
    (again,) = torch.autograd.grad(grad.square().sum(), q)
    assert grad.isfinite().all() and again.isfinite().all() and (grad[~seen] == 0).all()


def test_dropout():
    """The same mask on every backend; the share that is dropped, and the scale."""
    q, k = torch.zeros(2, 3, 64, 4), torch.zeros(2, 3, 128, 4)
    v = torch.eye(128).expand(2, 3, 128, 128)
    torch.manual_seed(1)
    weights = genkern.attention(q, k, v, dropout_p=0.25) * 128
    assert weights.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (weights == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(weights[0, 0], weights[1, 0])
    with genkern.use_backend("reference"):
        torch.manual_seed(1)
        torch.testing.assert_close(genkern.attention(q, k, v, dropout_p=0.25) * 128, weights)
        assert not torch.equal(genkern.attention(q, k, v, dropout_p=0.25) * 128, weights)
    assert (genkern.attention(q, k, v, dropout_p=1.0) == 0).all()
