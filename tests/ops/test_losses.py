"""Adversarial losses: the kernels against an independent formula and against the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jvp

import genkern
from genkern import losses
from genkern.losses import adversarial
from genkern.ops.losses import op, reference

ALL = [losses.get(name) for name in adversarial.NAMES]
SIDES = [(loss, side) for loss in ALL for side in "dg"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Element counts: none, one, below and around a vector, and across chunks with a ragged end.
COUNTS = [1, 5, 16, 33, 1000, 33001]
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def named(value):
    return repr(value).removeprefix("genkern.losses.").removeprefix("torch.")


every_side = pytest.mark.parametrize(("loss", "side"), SIDES, ids=lambda v: named(v).strip("'"))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=named)


def logits(count, dtype=torch.float64, spread=3.0):
    return ((torch.randn(count, dtype=torch.float64) * spread).to(dtype)).requires_grad_()


def call(loss, side, real, fake, **options):
    return loss.d(real, fake, **options) if side == "d" else loss.g(fake, real, **options)


def value_and_gradients(loss, side, real, fake, weight=1.0):
    """The loss and the gradients of both sides, zeros for a side that has no part in it."""
    value = call(loss, side, real, fake)
    inputs = [real, fake]
    grads = torch.autograd.grad(value * weight, inputs, allow_unused=True)
    return value, *(
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)
    )


def by_reference(*args, **kwargs):
    with genkern.use_backend("reference"):
        return value_and_gradients(*args, **kwargs)


def error(got, exact):
    return max(
        (g.double() - e.double()).abs().max().item() for g, e in zip(got, exact, strict=True)
    )


# ---- Meaning ------------------------------------------------------------------------------------


def independent(name, side, r, f):
    """Each loss as its paper writes it, by other functions than the reference uses."""
    bce = F.binary_cross_entropy_with_logits
    one, zero = torch.ones_like, torch.zeros_like
    log, sigmoid, clamp = torch.log, torch.sigmoid, torch.clamp
    if name.startswith("ra") and side == "g":
        r, f = f, r
    if name.startswith("ra"):
        r_than_f, f_than_r = r - f.sum() / f.numel(), f - r.sum() / r.numel()
    return {
        "nonsaturating d": lambda: bce(r, one(r)) + bce(f, zero(f)),
        "nonsaturating g": lambda: bce(f, one(f)),
        "saturating d": lambda: -log(sigmoid(r)).mean() - log(1 - sigmoid(f)).mean(),
        "saturating g": lambda: log(1 - sigmoid(f)).mean(),
        "hinge d": lambda: clamp(1 - r, min=0).mean() + clamp(1 + f, min=0).mean(),
        "hinge g": lambda: -f.mean(),
        "wgan d": lambda: f.mean() - r.mean(),
        "wgan g": lambda: -f.mean(),
        "lsgan d": lambda: 0.5 * F.mse_loss(r, one(r)) + 0.5 * F.mse_loss(f, zero(f)),
        "lsgan g": lambda: 0.5 * F.mse_loss(f, one(f)),
        "rpgan d": lambda: -log(sigmoid(r - f)).mean(),
        "rpgan g": lambda: -log(sigmoid(f - r)).mean(),
        "ragan": lambda: -log(sigmoid(r_than_f)).mean() - log(1 - sigmoid(f_than_r)).mean(),
        "rahinge": lambda: clamp(1 - r_than_f, min=0).mean() + clamp(1 + f_than_r, min=0).mean(),
        "rals": lambda: ((r_than_f - 1) ** 2).mean() + ((f_than_r + 1) ** 2).mean(),
    }[name if name.startswith("ra") else f"{name} {side}"]()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_side
def test_formula(loss, side, backend):
    real, fake = logits(257), logits(257)
    with genkern.use_backend(backend), genkern.explain() as log:
        got = value_and_gradients(loss, side, real, fake)
    assert {choice.backend for choice in log} == {backend}
    value = independent(loss.name, side, real, fake)
    grads = torch.autograd.grad(value, [real, fake], allow_unused=True)
    zero = torch.zeros_like(real)
    assert error(got, [value, *(zero if g is None else g for g in grads)]) < 5e-14


@pytest.mark.parametrize("loss", [losses.nonsaturating, losses.saturating], ids=named)
def test_label_smoothing(loss, cpu_level):
    real, fake = logits(40), logits(33)
    with genkern.use_backend("cpu"):
        value = loss.d(real, fake, real_target=0.9, fake_target=0.05)
    bce = F.binary_cross_entropy_with_logits
    expected = bce(real, torch.full_like(real, 0.9)) + bce(fake, torch.full_like(fake, 0.05))
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-14)
    got = torch.autograd.grad(value * 3, [real, fake])
    expected = torch.autograd.grad(expected * 3, [real, fake])
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_side
def test_sign_and_factor(loss, side, backend):
    """A discriminator whose low logits mean real: everything as with the negated logits."""
    real, fake = logits(40), logits(40)
    with genkern.use_backend(backend):
        value, stats = call(loss, side, real, fake, stats=True)
        other, other_stats = call(loss, side, -real, -fake, sign=-1, factor=3.0, stats=True)
        doubled = call(loss, side, real, fake, factor=2.0)
    own = 0.5 if loss is losses.lsgan else 1.0
    torch.testing.assert_close(other * own, 3 * value)
    torch.testing.assert_close(doubled * own, 2 * value)
    torch.testing.assert_close(other_stats[2:], stats[2:])
    torch.testing.assert_close(other_stats[0], -stats[0])


def test_options_of_least_squares():
    real, fake = logits(9), logits(7)
    value = losses.lsgan.d(real, fake, real_label=0.9, fake_label=-1.0, factor=1.0)
    expected = ((real - 0.9) ** 2).mean() + ((fake + 1) ** 2).mean()
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
    expected = 0.25 * ((fake - 2) ** 2).mean()
    torch.testing.assert_close(losses.lsgan.g(fake, target=2.0, factor=0.25), expected)


@every_dtype
@every_side
def test_exact_at_every_level(loss, side, dtype, cpu_level, poisoned):
    """Against fp64: at most 1.25 times eager's error in the same dtype, above a floor."""
    for count in COUNTS:
        real, fake = logits(count, dtype), logits(count, dtype)
        with genkern.use_backend("cpu"):
            got = value_and_gradients(loss, side, real, fake, weight=3.0)
        eager = by_reference(loss, side, real, fake, weight=3.0)
        wide = real.detach().double().requires_grad_(), fake.detach().double().requires_grad_()
        exact = by_reference(loss, side, *wide, weight=3.0)
        for g, e, x in zip(got, eager, exact, strict=True):
            # A mean may cancel to nearly nothing: its floor is that of the logits' size, about 1.
            largest = x.abs().max().item()
            scale = max(1.0, largest) if x.dim() == 0 else largest
            limit = 1.25 * error([e], [x]) + FLOOR[g.dtype] * scale
            assert error([g], [x]) <= limit, (count, g.dtype)
        assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert got[1].dtype == got[2].dtype == dtype


SEPARATE = [x for x in ALL if x is not losses.rpgan]


@pytest.mark.parametrize("loss", SEPARATE, ids=named)
def test_sides_of_different_length(loss, cpu_level):
    real, fake = logits(40000), logits(17)
    got = value_and_gradients(loss, "d", real, fake)
    assert error(got, by_reference(loss, "d", real, fake)) < 1e-14


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    which=st.integers(0, len(SIDES) - 1),
    dtype=st.sampled_from(DTYPES[:2]),
    spread=st.sampled_from([0.0, 1.0, 100.0]),
    strided=st.booleans(),
)
def test_any_shape(shape, which, dtype, spread, strided):
    loss, side = SIDES[which]
    base = [logits((*shape, 2), dtype, spread).detach() for _ in range(2)]
    real, fake = ((x[..., 0] if strided else x[..., 0].clone()).requires_grad_() for x in base)
    got = value_and_gradients(loss, side, real, fake)
    expected = by_reference(loss, side, real, fake)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6, equal_nan=True)


@every_side
def test_extreme_logits(loss, side, cpu_level):
    for dtype in (torch.float32, torch.float64):
        values = [0.0, -0.0, 1.0, -1.0, 1e4, -1e4, 88.0, -88.0, 104.0, -104.0, 745.0, -745.0]
        real = torch.tensor(values, dtype=dtype, requires_grad=True)
        fake = real.detach().flip(0).requires_grad_()
        got = value_and_gradients(loss, side, real, fake)
        for g, e in zip(got, by_reference(loss, side, real, fake), strict=True):
            # What flows through a mean of such logits cancels with the rest.
            largest = max(1.0, e.abs().max().item())
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-7 * largest)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_side
def test_nan_and_inf_as_eager(loss, side, bad, cpu_level):
    real, fake = logits(20, torch.float32), logits(20, torch.float32)
    with torch.no_grad():
        fake[3] = bad
    got, expected = (run(loss, side, real, fake)[0] for run in (value_and_gradients, by_reference))
    torch.testing.assert_close(got, expected, equal_nan=True)


@every_side
def test_the_same_bits_on_any_number_of_threads(loss, side, cpu_level):
    real, fake = logits(200_001, torch.float32), logits(200_001, torch.float32)
    results = []
    for count in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        results.append(value_and_gradients(loss, side, real, fake, weight=0.7))
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_chunks_than_the_table_holds():
    real, fake = logits(5_000_001, torch.float32), logits(3, torch.float32)
    value = losses.hinge.d(real, fake)
    expected = independent("hinge", "d", real.double(), fake.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


# ---- Statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_side
def test_statistics(loss, side, backend, poisoned):
    real, fake = logits(1234, torch.float32), logits(1234, torch.float32)
    with genkern.use_backend(backend):
        value, stats = call(loss, side, real, fake, stats=True)
    assert value.requires_grad and not any(s.requires_grad for s in stats)
    uses_real = side == "d" or loss.needs_real
    expected = [
        real.mean() if uses_real else torch.zeros(()),
        fake.mean(),
        (real > 0).float().mean() if uses_real else torch.zeros(()),
        (fake < 0).float().mean(),
    ]
    torch.testing.assert_close(list(stats), expected, rtol=1e-5, atol=1e-6)


# ---- Derivatives --------------------------------------------------------------------------------


@every_side
def test_gradcheck(loss, side):
    real, fake = logits(6), logits(6)
    with genkern.use_backend("cpu"):
        assert torch.autograd.gradcheck(lambda r, f: call(loss, side, r, f), (real, fake))
        assert torch.autograd.gradgradcheck(lambda r, f: call(loss, side, r, f), (real, fake))


def test_second_derivative_says_where_it_ran():
    real, fake = logits(6), logits(6)
    with genkern.explain() as log:
        torch.autograd.grad(losses.nonsaturating.d(real, fake), real, create_graph=True)
    assert [(c.op, c.backend) for c in log] == [(op.OP, "cpu"), (op.BACKWARD, "reference")]


def test_backward_twice():
    """The forward's own gradients are given away once; a second backward computes anew."""
    real, fake = logits(50, torch.float32), logits(50, torch.float32)
    value = losses.nonsaturating.d(real, fake)
    first = torch.autograd.grad(value, [real, fake], retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    second = torch.autograd.grad(value, [real, fake])
    torch.testing.assert_close(kept, list(second), rtol=0, atol=0)


def test_one_side_needs_no_gradient():
    real, fake = logits(50, torch.float32).detach(), logits(50, torch.float32)
    losses.hinge.d(real, fake).backward()
    assert real.grad is None and torch.equal(fake.grad, (fake > -1).float() / 50)


def test_same_tensor_on_both_sides():
    x = logits(33)
    (got,) = torch.autograd.grad(losses.nonsaturating.d(x, x), x)
    (expected,) = torch.autograd.grad(independent("nonsaturating", "d", x, x), x)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


def test_loss_scale_comes_before_rounding():
    """1e6 fp16 logits have gradients near 1e-6: rounded first, many would be lost to a scale."""
    fake = logits(1_000_000, torch.float16, spread=4.0)
    (got,) = torch.autograd.grad(losses.nonsaturating.g(fake) * 65536.0, fake)
    wide = fake.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(independent("nonsaturating", "g", None, wide) * 65536.0, wide)
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-10 + 2**-25).all()
    assert (got != 0).double().mean() > 0.999


@pytest.mark.parametrize("loss", [losses.wgan, losses.hinge], ids=named)
def test_linear_gradients_are_expanded_not_filled(loss):
    count = 2 * op.FEW
    fake = logits(count, torch.float32)
    with genkern.explain() as log:
        (grad,) = torch.autograd.grad(loss.g(fake), fake)
    assert {choice.backend for choice in log} == {"cpu"}
    assert grad.stride() == (0,) and torch.equal(grad, torch.full((count,), -1 / count))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("loss", "side"), [(losses.wgan, "d"), (losses.wgan, "g"), (losses.hinge, "g")], ids=named
)
def test_linear_losses_of_few_logits_are_torchs_mean(loss, side, sign):
    real, fake = logits(64), logits(50)
    options = {"factor": 0.5, "sign": sign}
    with genkern.explain() as log:
        value = call(loss, side, real, fake, **options)
    assert [c.backend for c in log] == ["reference"] and "torch's own dot" in log[0].reason
    got = torch.autograd.grad(value, [real, fake], allow_unused=True)
    with genkern.use_backend("cpu"):
        expected = call(loss, side, real, fake, **options)
        grads = torch.autograd.grad(expected, [real, fake], allow_unused=True)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(got, grads)


def test_modified_logits_are_noticed():
    real, fake = logits(5), logits(5)
    shifted = real * 1
    value = losses.nonsaturating.d(shifted, fake)
    value2 = value * 2  # not 1: the backward reads the logits again
    shifted.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value2.backward()


def test_jvp_is_refused_not_zero():
    real, fake = logits(5).detach(), logits(5).detach()
    with pytest.raises((RuntimeError, NotImplementedError)):
        jvp(losses.hinge.d, (real, fake), (real, fake))


def test_jvp_is_refused_when_compiled():
    real, fake = logits(5).detach(), logits(5).detach()
    tangent = torch.compile(lambda r, f: jvp(losses.hinge.d, (r, f), (r, f)), fullgraph=True)
    with pytest.raises(Exception, match="not supported by the kernels"):
        tangent(real, fake)


def test_r1():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    penalty = losses.r1((x * x) @ w, x, gamma=10.0)
    torch.testing.assert_close(penalty, 5 * (2 * x * w).square().sum(1).mean())
    (grad,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(grad, 40 * (x * x).mean(0) * w)
    with pytest.raises(ValueError, match=r"inputs must require gradients"):
        losses.r1(w.sum(), x.detach())


# ---- torch.library ------------------------------------------------------------------------------


def library_arguments(loss, side, dtype=torch.float32, lists=1):
    form = loss._discriminator if side == "d" else loss._generator
    counts = [40, 7][:lists]
    reals = [logits(n, dtype) for n in counts] if side == "d" or loss.needs_real else []
    return reals, [logits(n, dtype) for n in counts], *form.constants(), 1.5


@pytest.mark.parametrize("lists", [1, 2])
@pytest.mark.parametrize("side", ["d", "g"])
@pytest.mark.parametrize("loss", [losses.nonsaturating, losses.rpgan, losses.ragan], ids=named)
def test_opcheck(loss, side, lists):
    arguments = library_arguments(loss, side, lists=lists)
    torch.library.opcheck(torch.ops.genkern.adversarial_loss.default, arguments)
    detached = [[x.detach() for x in side] for side in arguments[:2]]
    torch.library.opcheck(
        torch.ops.genkern.adversarial_loss_backward.default,
        (torch.tensor(2.0), *detached, *arguments[2:]),
    )


@every_side
def test_compiled(loss, side):
    real, fake = logits(40, torch.float32), logits(40, torch.float32)
    eager = value_and_gradients(loss, side, real, fake, weight=2.0)
    torch._dynamo.reset()  # each case is a function of its own to the compiler
    compiled = torch.compile(lambda r, f: call(loss, side, r, f), fullgraph=True)
    with genkern.explain() as log:
        value = compiled(real, fake)
        grads = torch.autograd.grad(value * 2.0, [real, fake], allow_unused=True)
    assert {choice.backend for choice in log} == {"cpu"}
    torch.testing.assert_close(value, eager[0])
    for got, expected in zip(grads, eager[1:], strict=True):
        torch.testing.assert_close(torch.zeros_like(expected) if got is None else got, expected)


def test_compiled_with_one_tensor_for_both():
    x = logits(40, torch.float32)
    compiled = torch.compile(losses.nonsaturating.d, fullgraph=True)
    got = torch.autograd.grad(compiled(x, x), x)
    torch.testing.assert_close(got, torch.autograd.grad(losses.nonsaturating.d(x, x), x))


# ---- Arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "exception", "sentence"),
    [
        ((torch.ones(3), 1.0), TypeError, "fake must be a tensor, not float"),
        ((1.0, torch.ones(3)), TypeError, "real must be a tensor, not float"),
        (
            (torch.ones(3, dtype=torch.int64), torch.ones(3)),
            TypeError,
            "real must be of a floating",
        ),
        ((torch.ones(3), torch.ones(3).double()), TypeError, "fake must have real's dtype"),
        (
            (torch.ones(3), torch.ones(3, device="meta")),
            ValueError,
            "fake must be on real's device",
        ),
        ((torch.ones(3), torch.ones(4)), ValueError, r"one shape, not \(3,\) and \(4,\)"),
    ],
)
def test_bad_arguments(arguments, exception, sentence):
    with pytest.raises(exception, match=sentence):
        losses.rpgan.d(*arguments)


def test_relativistic_generator_needs_real():
    with pytest.raises(TypeError, match="real must be given, this loss compares pairs"):
        losses.rpgan.g(torch.ones(3))
    with pytest.raises(TypeError, match="real must be given, this loss compares with the other"):
        losses.rals.g(torch.ones(3))


def test_bad_conventions():
    with pytest.raises(ValueError, match="sign must be 1 or -1, not 0"):
        losses.hinge.g(torch.ones(3), sign=0)
    with pytest.raises(ValueError, match=r'reduction must be "sum" or "mean", not \'none\''):
        losses.hinge.g(torch.ones(3), reduction="none")


def test_get():
    assert losses.get("hinge") is losses.hinge
    assert losses.get("vanilla") is losses.get("logistic") is losses.nonsaturating
    assert all(losses.get(loss.name) is loss is getattr(losses, loss.name) for loss in ALL)
    with pytest.raises(ValueError, match=r"no loss 'hing'; there are hinge, "):
        losses.get("hing")


def test_lazy_tensors_are_resolved():
    x = torch.complex(torch.ones(4), torch.arange(4.0)).conj().imag  # a lazily negated view
    assert x.is_neg()
    assert losses.hinge.g(x) == 1.5
    zeros = torch._efficientzerotensor(4)
    assert losses.nonsaturating.g(zeros) == F.softplus(torch.zeros(()))


class Wrapped(torch.Tensor):
    pass


def test_a_tensor_without_plain_memory_is_refused_by_name():
    with pytest.raises(TypeError, match="fake is a Wrapped"):
        losses.hinge.g(torch.ones(4).as_subclass(Wrapped))


def test_fake_tensors_are_traced():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.ones(4, dtype=torch.bfloat16))
        value = losses.hinge.g(x)
    assert value.shape == () and value.dtype == torch.float32


def test_reference_for_other_dtypes_is_the_meaning():
    """The reference itself differentiates any number of times."""
    x = logits(4)
    form = losses.nonsaturating._generator
    assert torch.autograd.gradgradcheck(lambda f: reference.adversarial_loss(form, [], [f]), (x,))
