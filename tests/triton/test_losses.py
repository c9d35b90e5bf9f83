"""Adversarial losses in Triton against the fp64 reference."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern import backend, losses
from genkern.ops import _triton_lists
from genkern.ops.losses import op
from genkern.ops.losses.form import PAIRING_NUMBER, PHI_NUMBER, Form, Side

TILE = _triton_lists.TILE
# Every φ, pairing and sign, but not every name: a program costs 15 ms in the interpreter.
SIDES = [
    (losses.nonsaturating, "d"),
    (losses.saturating, "g"),
    (losses.hinge, "d"),
    (losses.wgan, "d"),
    (losses.lsgan, "d"),
    (losses.rpgan, "g"),
    (losses.ragan, "d"),
    (losses.rals, "g"),
]
every_side = pytest.mark.parametrize(
    ("loss", "side"), SIDES, ids=lambda v: repr(v).removeprefix("genkern.losses.").strip("'")
)
EPSILON = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 2**-10}
COUNTS = [5, TILE + 17, 1]  # ragged, the middle one of two tiles


def logits(count, dtype=torch.float32, spread=3.0):
    """Between NaNs, at an address that is not a multiple of 16 for a part of them."""
    memory = torch.full((count + 9,), float("nan"), dtype=dtype)
    part = memory[count % 3 : count % 3 + count]
    part.copy_(torch.randn(count, dtype=torch.float64) * spread)
    return part.requires_grad_()


def call(loss, side, real, fake, **options):
    return loss.d(real, fake, **options) if side == "d" else loss.g(fake, real, **options)


def value_and_gradients(value, inputs, scale=1.0):
    grads = torch.autograd.grad(value * scale, inputs, allow_unused=True)
    return [value.detach()] + [
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)
    ]


def wide(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_near(got, exact, dtype):
    """Values and statistics come in fp32, and every tensor is compared at its own largest."""
    for g, e in zip(got, exact, strict=True):
        within = EPSILON[torch.float32 if dtype is torch.float16 and g.dtype != dtype else dtype]
        atol = within * (e.abs().max().item() if e.dim() else 1.0) if e.numel() else 0
        torch.testing.assert_close(g.double(), e, rtol=within, atol=atol, equal_nan=True)


# ---- Meaning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EPSILON, ids=lambda d: str(d).removeprefix("torch."))
@every_side
def test_lists_against_the_reference(loss, side, dtype, on_triton, poisoned):
    real, fake = ([logits(n, dtype) for n in COUNTS] for _ in range(2))
    inputs = [*real, *fake]
    value, stats = call(loss, side, real, fake, reduction="mean", factor=1.5, stats=True)
    got = value_and_gradients(value, inputs, 3.0)
    assert {choice.backend for choice in on_triton} == {"triton"}
    assert len(on_triton) == 2
    assert got[0].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    with genkern.use_backend("reference"):
        inputs = wide(inputs)
        real, fake = inputs[: len(COUNTS)], inputs[len(COUNTS) :]
        value, expected = call(loss, side, real, fake, reduction="mean", factor=1.5, stats=True)
        assert_near(got, value_and_gradients(value, inputs, 3.0), dtype)
    assert_near([*stats], [*expected], dtype)


@pytest.mark.parametrize("loss", [losses.hinge, losses.ragan], ids=lambda x: x.name)
def test_sides_of_different_length(loss, on_triton, poisoned):
    real, fake = logits(5 * TILE + 3), logits(17)
    got = value_and_gradients(loss.d(real, fake), [real, fake])
    assert {choice.backend for choice in on_triton} == {"triton"}
    with genkern.use_backend("reference"):
        inputs = wide([real, fake])
        assert_near(got, value_and_gradients(loss.d(*inputs), inputs), torch.float32)


numbers = st.sampled_from([-1.0, 0.3, 1.0, 2.0])


@settings(max_examples=25, deadline=None)
@given(
    phi=st.sampled_from(list(PHI_NUMBER)),
    pairing=st.sampled_from(list(PAIRING_NUMBER)),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    lines=st.lists(numbers, min_size=6, max_size=6),
    slopes=st.lists(st.sampled_from([0.0, 0.1]), min_size=2, max_size=2),
    has_real=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
)
def test_any_form(phi, pairing, counts, lines, slopes, has_real, dtype):
    if pairing != "separate" or phi == "identity":
        slopes = [0.0, 0.0]  # the contract: of separate sides only
    if phi == "identity" and pairing == "average":
        pairing = "separate"  # not a loss that anyone has
    if pairing != "separate":
        has_real = True
        counts = [max(1, n) for n in counts]
    form = Form(phi, Side(*lines[:3], slopes[0]), Side(*lines[3:], slopes[1]), pairing, lines[0])
    fake = [logits(n, dtype) for n in counts]
    real = [logits(n, dtype) for n in counts] if has_real else None
    inputs = [*(real or []), *fake]
    with genkern.use_backend("triton"), genkern.explain() as log:
        value, stats = op.adversarial_loss(form, real, fake, factor=0.7, stats=True)
        got = value_and_gradients(value, inputs, 2.0)
    assert {choice.backend for choice in log} == {"triton"}
    with genkern.use_backend("reference"):
        inputs = wide(inputs)
        real, fake = inputs[: -len(fake)] or None, inputs[-len(fake) :]
        value, expected = op.adversarial_loss(form, real, fake, factor=0.7, stats=True)
        exact = value_and_gradients(value, inputs, 2.0)
    if dtype is torch.float16:  # a sum of what cancels has the rounding of the parts
        scale = sum(x.abs().max().item() for x in inputs if x.numel()) ** 2 + 1
        for g, e in zip(got, exact, strict=True):
            torch.testing.assert_close(g.double(), e, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)
        return
    for g, e in zip([*got, stats], [*exact, expected], strict=True):
        within = 1e-4 if dtype is torch.float32 else 1e-11
        torch.testing.assert_close(g.double(), e, rtol=within, atol=within, equal_nan=True)


@every_side
def test_extreme_logits(loss, side, on_triton):
    for dtype in (torch.float32, torch.float64):
        values = [0.0, -0.0, 1.0, -1.0, 1e4, -1e4, 88.0, -88.0, 104.0, -104.0, 745.0, -745.0]
        real = torch.tensor(values, dtype=dtype, requires_grad=True)
        fake = real.detach().flip(0).requires_grad_()
        got = value_and_gradients(call(loss, side, real, fake), [real, fake])
        with genkern.use_backend("reference"):
            expected = value_and_gradients(call(loss, side, real, fake), [real, fake])
        for g, e in zip(got, expected, strict=True):
            largest = max(1.0, e.abs().max().item())
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-7 * largest)


@pytest.mark.parametrize("z", [-90.0, -40.0, -17.0, -9.0, -1.0, -1e-3, 0.0])
def test_softplus_is_precise_where_it_is_small(z, on_triton):
    """Relative to its own size: a confident discriminator's loss is near e^z."""
    for dtype, within in ((torch.float32, 1e-6), (torch.float64, 5e-15)):
        value = losses.nonsaturating.g(torch.full((3,), -z, dtype=dtype))
        exact = torch.nn.functional.softplus(torch.tensor(z, dtype=torch.float64))
        # Below 1.2e-38 fp32 has fewer digits: a few of its smallest numbers.
        torch.testing.assert_close(value.double(), exact, rtol=within, atol=1e-44)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_side
def test_nan_and_inf_as_eager(loss, side, bad, on_triton):
    real, fake = logits(20), logits(20)
    with torch.no_grad():
        fake[3] = bad
    got = call(loss, side, real, fake)
    with genkern.use_backend("reference"):
        torch.testing.assert_close(got, call(loss, side, real, fake), equal_nan=True)


def test_loss_scale_comes_before_rounding(on_triton):
    fake = logits(30_000, torch.float16, spread=8.0)
    (got,) = torch.autograd.grad(losses.nonsaturating.g(fake) * 16384.0, fake)
    (exact,) = wide([fake])
    with genkern.use_backend("reference"):
        (exact,) = torch.autograd.grad(losses.nonsaturating.g(exact) * 16384.0, exact)
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-10 + 2**-25).all()


# ---- Launches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "forward", "backward"),
    [(losses.nonsaturating, 1, 1), (losses.rpgan, 1, 1), (losses.ragan, 2, 1), (losses.wgan, 1, 0)],
    ids=lambda v: getattr(v, "name", None),
)
def test_launches(loss, forward, backward, on_triton, launches):
    real, fake = ([logits(n) for n in COUNTS * 2] for _ in range(2))
    value, _ = loss.d(real, fake, stats=True)
    assert len(launches) == forward
    grads = torch.autograd.grad(value, [*real, *fake])
    assert len(launches) == forward + backward
    if not backward:  # linear: expanded, not filled
        assert grads[0].stride() == (0,)


def test_the_same_bits_on_every_run(on_triton):
    real, fake = ([logits(n) for n in (4 * TILE, 7)] for _ in range(2))
    results = [
        value_and_gradients(losses.ragan.d(real, fake), [*real, *fake], 0.7) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_sides_gradient_alone(on_triton, poisoned):
    """No program is started for the side that wants none."""
    real, fake = logits(50).detach(), logits(50)
    for loss in (losses.hinge, losses.rpgan):
        (got,) = torch.autograd.grad(loss.d(real, fake), fake)
        with genkern.use_backend("reference"):
            torch.testing.assert_close(got, torch.autograd.grad(loss.d(real, fake), fake)[0])


def test_long_runs(on_triton, monkeypatch):
    """Programs that take many tiles, as those of hundreds of millions of logits do."""
    monkeypatch.setattr(_triton_lists, "PROGRAMS_AIM", 2)
    real, fake = logits(23 * TILE + 5), logits(9 * TILE)
    assert _triton_lists.cut([real.numel(), fake.numel()], [1, 1]) == (32, [0, 1, 2])
    got = value_and_gradients(losses.nonsaturating.d(real, fake), [real, fake])
    inputs = wide([real, fake])
    with genkern.use_backend("reference"):
        exact = value_and_gradients(losses.nonsaturating.d(*inputs), inputs)
    assert_near(got, exact, torch.float32)


@pytest.mark.parametrize(("aim", "run"), [(1, 32), (5, 8), (100, 1)])
def test_cut(aim, run, monkeypatch):
    monkeypatch.setattr(_triton_lists, "PROGRAMS_AIM", aim)
    counts = [0, 20 * TILE + 1, -1, TILE, 0]
    got, firsts = _triton_lists.cut(counts, [1] * 5)
    programs = [-(-max(0, -(-n // TILE)) // run) for n in counts]
    assert got == run
    assert firsts == [sum(programs[:i]) for i in range(len(counts) + 1)]
    _, firsts = _triton_lists.cut([TILE + 1, 5], [3, 2])
    assert firsts == [0, 3 * -(-2 // min(run, 8)), 3 * -(-2 // min(run, 8)) + 2]


# ---- Derivatives, torch.library -----------------------------------------------------------------


@pytest.mark.parametrize("loss", [losses.lsgan, losses.rpgan, losses.ragan], ids=lambda x: x.name)
def test_gradcheck(loss, on_triton):
    real, fake = logits(2, torch.float64), logits(2, torch.float64)
    assert torch.autograd.gradcheck(loss.d, (real, fake))


def test_second_derivatives_are_the_references(on_triton):
    real, fake = logits(2, torch.float64), logits(2, torch.float64)
    assert torch.autograd.gradgradcheck(losses.nonsaturating.d, (real, fake))
    assert {choice.backend for choice in on_triton} == {"triton", "reference"}


@pytest.mark.parametrize(("loss", "side"), [(losses.ragan, "d"), (losses.hinge, "g")])
def test_compiled(loss, side, on_triton):
    real, fake = ([logits(n) for n in (40, 7)] for _ in range(2))
    inputs = [*real, *fake]
    eager = value_and_gradients(call(loss, side, real, fake), inputs, 2.0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda r, f: call(loss, side, r, f), fullgraph=True)
    on_triton.clear()
    got = value_and_gradients(compiled(real, fake), inputs, 2.0)
    assert {choice.backend for choice in on_triton} == {"triton"}
    torch.testing.assert_close(got, eager)


# ---- On a GPU -----------------------------------------------------------------------------------


def test_choice_on_a_gpu(monkeypatch):
    """The CUDA kernels, or Triton's where those were not built."""
    tensor = SimpleNamespace(is_cpu=False, is_cuda=True, dtype=torch.float32)
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    assert op._choose(op.OP, [tensor]) == "cuda"
    monkeypatch.setattr(backend, "has_cuda", lambda: False)
    assert op._choose(op.OP, [tensor]) == "triton"


def test_compiles_for_every_target(assemblies, fits):
    fits(assemblies("compile_losses.py"))


@pytest.mark.exhaustive
def test_every_form_compiles_for_every_target(assemblies, fits):
    fits(assemblies("compile_losses.py", "exhaustive"))
