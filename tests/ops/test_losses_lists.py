"""Adversarial losses of several discriminators: lists go in as they are, one call for all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern import losses
from genkern.losses import adversarial
from genkern.ops.losses import op

ALL = [losses.get(name) for name in adversarial.NAMES]
SIDES = [(loss, side) for loss in ALL for side in "dg"]
every_side = pytest.mark.parametrize(
    ("loss", "side"), SIDES, ids=lambda v: repr(v).removeprefix("genkern.losses.").strip("'")
)
SHAPES = [(16, 1), (3, 1, 5, 4), (33001,), (1,)]  # ragged, and one that is cut into chunks


def logits(*shape, dtype=torch.float64):
    return (torch.randn(shape, dtype=torch.float64) * 2).to(dtype).requires_grad_()


def lists(dtype=torch.float64, shapes=SHAPES):
    return [[logits(*s, dtype=dtype) for s in shapes] for _ in range(2)]


def call(loss, side, real, fake, **options):
    return loss.d(real, fake, **options) if side == "d" else loss.g(fake, real, **options)


def value_and_gradients(value, inputs, scale=1.0):
    grads = torch.autograd.grad(value * scale, inputs, allow_unused=True)
    return [value.detach()] + [
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)
    ]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@every_side
def test_as_one_call_a_discriminator(loss, side, reduction, cpu_level, poisoned):
    real, fake = lists()
    inputs = [*real, *fake]
    scale = 1.0 if reduction == "sum" else 3.0
    with genkern.use_backend("cpu"):
        with genkern.explain() as log:
            value, stats = call(loss, side, real, fake, reduction=reduction, stats=True)
            got = value_and_gradients(value, inputs, scale)
        assert [(c.op, c.backend) for c in log] == [(op.OP, "cpu"), (op.BACKWARD, "cpu")]
    with genkern.use_backend("reference"):
        each = [call(loss, side, r, f, stats=True) for r, f in zip(real, fake, strict=True)]
        total = sum(value for value, _ in each)
        total = total / len(each) if reduction == "mean" else total
        expected = value_and_gradients(total, inputs, scale)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)
    for name, values in stats._asdict().items():
        assert values.shape == (len(SHAPES),) and not values.requires_grad
        alone = torch.stack([getattr(s, name) for _, s in each])
        torch.testing.assert_close(values, alone)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    which=st.integers(0, len(SIDES) - 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    strided=st.booleans(),
)
def test_any_shapes(shapes, which, dtype, strided):
    loss, side = SIDES[which]
    wide = [[torch.randn(*s, 2) for s in shapes] for _ in range(2)]
    real, fake = (
        [(x[..., 0] if strided else x[..., 0].clone()).to(dtype).requires_grad_() for x in xs]
        for xs in wide
    )
    inputs = [*real, *fake]
    with genkern.use_backend("cpu"):
        got = value_and_gradients(call(loss, side, real, fake), inputs)
    with genkern.use_backend("reference"):
        expected = value_and_gradients(call(loss, side, real, fake), inputs)
    within = {"rtol": 1e-5, "atol": 1e-6} if dtype.itemsize >= 4 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(got, expected, equal_nan=True, **within)


@every_side
def test_compiled(loss, side):
    real, fake = lists(torch.float32, [(16, 1), (3, 2)])
    inputs = [*real, *fake]
    eager = value_and_gradients(call(loss, side, real, fake), inputs, 2.0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda r, f: call(loss, side, r, f), fullgraph=True)
    with genkern.explain() as log:
        got = value_and_gradients(compiled(real, fake), inputs, 2.0)
    assert {choice.backend for choice in log} == {"cpu"}
    torch.testing.assert_close(got, eager)


@pytest.mark.parametrize("loss", [losses.lsgan, losses.ragan], ids=lambda x: x.name)
def test_gradcheck(loss):
    inputs = [logits(3), logits(2, 2), logits(4), logits(5)]

    def function(*x):
        return loss.d(x[:2], x[2:], reduction="mean")

    with genkern.use_backend("cpu"):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_the_same_bits_on_any_number_of_threads(cpu_level):
    real, fake = lists(torch.float32, [(200_001,), (5,), (70_000,)])
    results, before = [], torch.get_num_threads()
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(value_and_gradients(losses.ragan.d(real, fake), [*real, *fake], 0.7))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("real", "fake", "exception", "sentence"),
    [
        ([torch.ones(2)], torch.ones(2), TypeError, "fake must be a list of logits by discrimin"),
        (torch.ones(2), [torch.ones(2)], TypeError, "real must be a list of logits by discrimin"),
        ([torch.ones(2)], [torch.ones(2)] * 2, ValueError, "as many discriminators, not of 1 and"),
        ([], [], ValueError, "at least one discriminator, not none"),
        ([torch.ones(2)], [1.0], TypeError, r"fake\[0\] must be a tensor, not float"),
        (
            [torch.ones(2), torch.ones(2)],
            [torch.ones(2), torch.ones(3)],
            ValueError,
            r"real\[1\] and fake\[1\] go in pairs here and must have one shape, not \(2,\) and",
        ),
    ],
)
def test_bad_arguments(real, fake, exception, sentence):
    with pytest.raises(exception, match=sentence):
        losses.rpgan.d(real, fake)
