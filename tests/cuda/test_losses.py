"""Adversarial losses in CUDA against the fp64 reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern import losses
from genkern.ops.losses import cuda, op
from genkern.ops.losses.form import PAIRING_NUMBER, PHI_NUMBER, Form, Side

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
EPSILON = {
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
    torch.float64: 1e-13,
}
# A kernel is compiled for every dtype, which takes as long as all of its tests.
every_dtype = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        pytest.param(torch.float16, marks=pytest.mark.exhaustive),
        pytest.param(torch.float64, marks=pytest.mark.exhaustive),
    ],
    ids=lambda d: str(d).removeprefix("torch."),
)
STEP = 1024  # fp32 elements that a block takes at a time
COUNTS = [5, STEP + 17, 1]  # ragged, the middle one of two blocks


def logits(count, dtype=torch.float32, spread=3.0, device="cpu"):
    """Between NaNs, at an address that is not a multiple of 16 for a part of them."""
    memory = torch.full((count + 9,), float("nan"), dtype=dtype)
    memory[count % 3 : count % 3 + count] = torch.randn(count, dtype=torch.float64) * spread
    return memory.to(device)[count % 3 : count % 3 + count].requires_grad_()


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
        within = EPSILON[torch.float32 if dtype.itemsize == 2 and g.dtype != dtype else dtype]
        atol = within * (e.abs().max().item() if e.dim() else 1.0) if e.numel() else 0
        torch.testing.assert_close(g.double(), e, rtol=within, atol=atol, equal_nan=True)


def names(launches):
    return [
        next(x for x in ("forward", "backward") if f"adversarial_{x}_kernel" in launch.kernel)
        for launch in launches
    ]


# ---- Meaning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
@every_dtype
@every_side
def test_lists_against_the_reference(loss, side, dtype, scale, on_cuda, poisoned, device):
    real, fake = ([logits(n, dtype, device=device) for n in COUNTS] for _ in range(2))
    inputs = [*real, *fake]
    value, stats = call(loss, side, real, fake, reduction="mean", factor=1.5, stats=True)
    got = value_and_gradients(value, inputs, scale)
    assert [(c.op, c.backend) for c in on_cuda] == [(op.OP, "cuda"), (op.BACKWARD, "cuda")]
    assert got[0].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    with genkern.use_backend("reference"):
        inputs = wide(inputs)
        real, fake = inputs[: len(COUNTS)], inputs[len(COUNTS) :]
        value, expected = call(loss, side, real, fake, reduction="mean", factor=1.5, stats=True)
        assert_near(got, value_and_gradients(value, inputs, scale), dtype)
    assert_near([*stats], [*expected], dtype)


@pytest.mark.parametrize("loss", [losses.hinge, losses.ragan], ids=lambda x: x.name)
def test_sides_of_different_length(loss, on_cuda, poisoned, device):
    real, fake = logits(5 * STEP + 3, device=device), logits(17, device=device)
    got = value_and_gradients(loss.d(real, fake), [real, fake])
    assert {choice.backend for choice in on_cuda} == {"cuda"}
    with genkern.use_backend("reference"):
        inputs = wide([real, fake])
        assert_near(got, value_and_gradients(loss.d(*inputs), inputs), torch.float32)


def test_more_discriminators_than_a_warp_has_threads(on_cuda, poisoned, device):
    counts = [3 + i % 4 for i in range(40)]
    real, fake = ([logits(n, device=device) for n in counts] for _ in range(2))
    value, stats = losses.ragan.d(real, fake, stats=True)
    got = value_and_gradients(value, [*real, *fake])
    with genkern.use_backend("reference"):
        inputs = wide([*real, *fake])
        value, expected = losses.ragan.d(inputs[:40], inputs[40:], stats=True)
        assert_near(got, value_and_gradients(value, inputs), torch.float32)
    assert_near([*stats], [*expected], torch.float32)


numbers = st.sampled_from([-1.0, 0.3, 1.0, 2.0])


@settings(max_examples=25, deadline=None)
@given(
    phi=st.sampled_from(list(PHI_NUMBER)),
    pairing=st.sampled_from(list(PAIRING_NUMBER)),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    lines=st.lists(numbers, min_size=6, max_size=6),
    slopes=st.lists(st.sampled_from([0.0, 0.1]), min_size=2, max_size=2),
    has_real=st.booleans(),
    scale=st.sampled_from([1.0, 2.0]),
)
def test_any_form(running_cuda, phi, pairing, counts, lines, slopes, has_real, scale):
    if pairing != "separate" or phi == "identity":
        slopes = [0.0, 0.0]  # the contract: of separate sides only
    if phi == "identity" and pairing == "average":
        pairing = "separate"  # not a loss that anyone has
    if pairing != "separate":
        has_real = True
        counts = [max(1, n) for n in counts]
    form = Form(phi, Side(*lines[:3], slopes[0]), Side(*lines[3:], slopes[1]), pairing, lines[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fake = [logits(n, device=device) for n in counts]
    real = [logits(n, device=device) for n in counts] if has_real else None
    inputs = [*(real or []), *fake]
    with running_cuda() as log:
        value, stats = op.adversarial_loss(form, real, fake, factor=0.7, stats=True)
        got = value_and_gradients(value, inputs, scale)
    assert {choice.backend for choice in log} == {"cuda"}
    with genkern.use_backend("reference"):
        inputs = wide(inputs)
        real, fake = inputs[: -len(fake)] or None, inputs[-len(fake) :]
        value, expected = op.adversarial_loss(form, real, fake, factor=0.7, stats=True)
        exact = value_and_gradients(value, inputs, scale)
    for g, e in zip([*got, stats], [*exact, expected], strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-4, equal_nan=True)


@every_side
def test_extreme_logits(loss, side, on_cuda, device):
    values = [0.0, -0.0, 1.0, -1.0, 1e4, -1e4, 88.0, -88.0, 104.0, -104.0, 745.0, -745.0]
    real = torch.tensor(values, device=device, requires_grad=True)
    fake = real.detach().flip(0).requires_grad_()
    got = value_and_gradients(call(loss, side, real, fake), [real, fake])
    with genkern.use_backend("reference"):
        expected = value_and_gradients(call(loss, side, real, fake), [real, fake])
    for g, e in zip(got, expected, strict=True):
        largest = max(1.0, e.abs().max().item())
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-7 * largest)


@pytest.mark.parametrize("z", [-90.0, -40.0, -17.0, -9.0, -1.0, -1e-3, 0.0])
def test_softplus_is_precise_where_it_is_small(z, on_cuda, device):
    """Relative to its own size: a confident discriminator's loss is near e^z."""
    value = losses.nonsaturating.g(torch.full((3,), -z, device=device))
    exact = torch.nn.functional.softplus(torch.tensor(z, dtype=torch.float64))
    torch.testing.assert_close(value.double().cpu(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_side
def test_nan_and_inf_as_eager(loss, side, bad, on_cuda, device):
    real, fake = logits(20, device=device), logits(20, device=device)
    with torch.no_grad():
        fake[3] = bad
    got = call(loss, side, real, fake)
    with genkern.use_backend("reference"):
        torch.testing.assert_close(got, call(loss, side, real, fake), equal_nan=True)


@pytest.mark.exhaustive
def test_loss_scale_comes_before_rounding(on_cuda, device):
    fake = logits(30_000, torch.float16, spread=8.0, device=device)
    (got,) = torch.autograd.grad(losses.nonsaturating.g(fake) * 16384.0, fake)
    (exact,) = wide([fake])
    with genkern.use_backend("reference"):
        (exact,) = torch.autograd.grad(losses.nonsaturating.g(exact) * 16384.0, exact)
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-10 + 2**-25).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("loss", [losses.lsgan, losses.rpgan, losses.ragan], ids=lambda x: x.name)
def test_gradcheck(loss, on_cuda, device):
    real, fake = (logits(2, torch.float64, device=device) for _ in range(2))
    assert torch.autograd.gradcheck(loss.d, (real, fake))


# ---- Launches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "forward", "backward"),
    [(losses.nonsaturating, 1, 1), (losses.rpgan, 1, 1), (losses.ragan, 2, 1), (losses.wgan, 1, 0)],
    ids=lambda v: getattr(v, "name", None),
)
def test_launches(loss, forward, backward, on_cuda, launches):
    """However many discriminators there are."""
    real, fake = ([logits(n) for n in COUNTS * 2] for _ in range(2))
    value, _ = loss.d(real, fake, stats=True)
    grads = torch.autograd.grad(value, [*real, *fake])
    assert names(launches) == ["forward"] * forward + ["backward"] * backward
    if not backward:  # linear: expanded, not filled
        assert grads[0].stride() == (0,)


def test_gradients_come_with_the_loss(on_cuda, launches, poisoned):
    """The backward touches them only where grad_loss is not 1."""
    real, fake = logits(50), logits(50)
    value = losses.nonsaturating.d(real, fake)
    grads = torch.autograd.grad(value, [real, fake], retain_graph=True)
    assert launches[0].result.bytes_written >= 400
    assert launches[1].result.bytes_written == 0
    kept = [g.clone() for g in grads]
    again = torch.autograd.grad(value, [real, fake], torch.tensor(0.5))
    assert launches[2].result.bytes_written == 400
    for grad, before, half in zip(grads, kept, again, strict=True):
        assert torch.equal(grad, before)  # whose the forward's were keeps them
        torch.testing.assert_close(half, before / 2)


def test_a_sides_gradient_alone(on_cuda, poisoned, device):
    """No block is started for the side that wants none."""
    real, fake = logits(50, device=device).detach(), logits(50, device=device)
    for loss in (losses.hinge, losses.rpgan, losses.ragan):
        for scale in (1, 2):
            (got,) = torch.autograd.grad(loss.d(real, fake) * scale, fake)
            with genkern.use_backend("reference"):
                (exact,) = torch.autograd.grad(loss.d(real, fake) * scale, fake)
            torch.testing.assert_close(got, exact)


def test_the_same_bits_in_any_order(running_cuda):
    if torch.cuda.is_available():
        pytest.skip("an order is the executor's to choose")
    real, fake = ([logits(n) for n in (3 * STEP, 7)] for _ in range(2))
    results = []
    for schedule in ("sequential", "reversed", 7):
        with running_cuda(schedule):
            results.append(value_and_gradients(losses.ragan.d(real, fake), [*real, *fake], 0.7))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_long_runs(on_cuda, monkeypatch, device):
    """Blocks that take many steps, as those of hundreds of millions of logits do."""
    monkeypatch.setattr(cuda, "BLOCKS_AIM", 2)
    real, fake = logits(23 * STEP + 5, device=device), logits(9 * STEP, device=device)
    got = value_and_gradients(losses.nonsaturating.d(real, fake), [real, fake])
    inputs = wide([real, fake])
    with genkern.use_backend("reference"):
        exact = value_and_gradients(losses.nonsaturating.d(*inputs), inputs)
    assert_near(got, exact, torch.float32)


@pytest.mark.parametrize(("aim", "run"), [(1, 32), (5, 8), (100, 1)])
def test_plan(aim, run):
    """Eight numbers an array: its first block, its blocks, …"""
    native = op.native
    counts = [(0, 20 * STEP + 1), (STEP, 0), (7, 3)]
    terms = [x for real, fake in counts for x in (16, 32, real, fake, 48, 0)]
    form = losses.hinge._discriminator.native()
    plan = native.adversarial_cuda_plan(form, 0, tuple(terms), False, aim)
    sizes = [real for real, _ in counts] + [fake for _, fake in counts]
    blocks = [math.ceil(math.ceil(n / STEP) / run) for n in sizes]
    assert (plan.run, plan.blocks) == (run, sum(blocks))
    assert plan.table[1::8] == blocks
    assert plan.table[::8] == [sum(blocks[:i]) for i in range(len(sizes))]
    alone = native.adversarial_cuda_plan(form, 0, tuple(terms), True, aim)
    assert alone.blocks == sum(blocks[:3])  # only real sides have an address for theirs
    bf16 = native.adversarial_cuda_plan(form, 2, tuple(terms), False, 100)
    assert bf16.blocks == sum(math.ceil(n / STEP / 2) for n in sizes)


@pytest.mark.parametrize("loss", [losses.ragan, losses.hinge], ids=lambda x: x.name)
def test_a_backward_without_its_forward(loss, on_cuda, device):
    """As torch.compile calls it: the means are made anew."""
    real, fake = ([logits(n, device=device) for n in (40, 7)] for _ in range(2))
    inputs, upstream = [*real, *fake], torch.tensor(2.0, device=device)
    form = loss._discriminator
    got = op._backward("cuda", form, 1.0, 2, inputs, upstream, [True] * 4)
    with genkern.use_backend("reference"):
        _, *exact = value_and_gradients(loss.d(real, fake), inputs, 2.0)
    torch.testing.assert_close(got, exact)
