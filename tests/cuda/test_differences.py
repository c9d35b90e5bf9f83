"""Mean differences of pairs of tensors in CUDA against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern import losses
from genkern.ops.differences import cuda, op

STEP = 1024  # fp32 elements that a block takes at a time
COUNTS = [5, STEP + 17, 1]
WEIGHTS = [1.0, 0.5, 3.0]
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
every_distance = pytest.mark.parametrize("distance", ["absolute", "square"])


def numbers(count, dtype=torch.float32, device="cpu"):
    """Between NaNs, at an address that is not a multiple of 16 for a part of them."""
    memory = torch.full((count + 9,), float("nan"), dtype=dtype)
    memory[count % 3 : count % 3 + count] = torch.randn(count, dtype=torch.float64)
    return memory.to(device)[count % 3 : count % 3 + count].requires_grad_()


def value_and_gradients(a, b, distance, weights, scale=1.0):
    names = [(f"a[{i}]", f"b[{i}]") for i in range(len(a))]
    value = op.differences(names, a, b, distance, weights)
    return [value.detach(), *torch.autograd.grad(value * scale, [*a, *b])]


def wide(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def names(launches):
    return [
        next(x for x in ("forward", "backward") if f"differences_{x}_kernel" in launch.kernel)
        for launch in launches
    ]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@every_dtype
@every_distance
def test_against_the_reference(distance, dtype, scale, on_cuda, poisoned, device):
    a, b = ([numbers(n, dtype, device) for n in COUNTS] for _ in range(2))
    got = value_and_gradients(a, b, distance, WEIGHTS, scale)
    assert [(c.op, c.backend) for c in on_cuda] == [(op.OP, "cuda"), (op.BACKWARD, "cuda")]
    with genkern.use_backend("reference"):
        exact = value_and_gradients(wide(a), wide(b), distance, WEIGHTS, scale)
    for g, e in zip(got, exact, strict=True):
        within = EPSILON[torch.float32 if dtype.itemsize == 2 and g.dtype != dtype else dtype]
        atol = within * e.abs().max().item()
        torch.testing.assert_close(g.double(), e, rtol=within, atol=atol)


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    distance=st.sampled_from(["absolute", "square"]),
    strided=st.sampled_from(["no", "one", "both"]),
    scale=st.sampled_from([1.0, 0.5]),
)
def test_any_shapes(running_cuda, shapes, distance, strided, scale):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = ([torch.randn(*shape, 2, device=device)[..., 0] for shape in shapes] for _ in range(2))
    a = [x if strided != "no" else x.clone() for x in a]
    b = [x if strided == "both" else x.contiguous() for x in b]
    for x in (*a, *b):
        x.requires_grad_()
    with running_cuda() as log:
        got = value_and_gradients(a, b, distance, [1.5] * len(a), scale)
    assert {choice.backend for choice in log} == {"cuda"}
    with genkern.use_backend("reference"):
        expected = value_and_gradients(a, b, distance, [1.5] * len(a), scale)
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_channels_last_keeps_its_layout(on_cuda, device):
    a, b = (
        torch.randn(2, 3, 4, 5, device=device)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(2)
    )
    got = value_and_gradients([a], [b], "absolute", [1.0])
    assert got[1].stride() == a.stride()
    with genkern.use_backend("reference"):
        torch.testing.assert_close(got, value_and_gradients([a], [b], "absolute", [1.0]))


@every_distance
def test_nan_and_equal(distance, on_cuda, device):
    a = torch.tensor([1.0, float("nan"), 0.0, 3.0], device=device, requires_grad=True)
    b = torch.tensor([1.0, 2.0, 0.0, 4.0], device=device, requires_grad=True)
    got = value_and_gradients([a], [b], distance, [1.0])
    with genkern.use_backend("reference"):
        expected = value_and_gradients([a], [b], distance, [1.0])
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_feature_matching_of_lists_of_lists(on_cuda, launches):
    """HiFi-GAN's nine discriminators of six feature maps: one launch forward, one backward."""
    real = [[numbers(3 + i).detach() for i in range(6)] for _ in range(9)]
    fake = [[numbers(3 + i) for i in range(6)] for _ in range(9)]
    inputs = [x for features in fake for x in features]
    value = losses.feature_matching(real, fake)
    got = [value, *torch.autograd.grad(value, inputs)]
    assert names(launches) == ["forward", "backward"]
    with genkern.use_backend("reference"):
        value = losses.feature_matching(real, fake)
        torch.testing.assert_close(got, [value, *torch.autograd.grad(value, inputs)])


def test_gradients_come_with_the_loss(on_cuda, launches, poisoned):
    """The backward touches them only where grad_loss is not 1."""
    a, b = numbers(50), numbers(50)
    value = op.differences([("a", "b")], [a], [b], "square", [1.0])
    (grad,) = torch.autograd.grad(value, [a], retain_graph=True)
    assert launches[0].result.bytes_written >= 400
    assert launches[1].result.bytes_written == 0
    kept = grad.clone()
    (half,) = torch.autograd.grad(value, [a], torch.tensor(0.5))
    assert launches[2].result.bytes_written == 400
    assert torch.equal(grad, kept)  # whose the forward's were keeps them
    torch.testing.assert_close(half, kept / 2)


def test_long_runs(on_cuda, monkeypatch, device):
    """Blocks that take many steps, as those of hundreds of millions of elements do."""
    monkeypatch.setattr(cuda, "BLOCKS_AIM", 2)
    a, b = ([numbers(n, device=device) for n in (23 * STEP + 5, 9 * STEP)] for _ in range(2))
    got = value_and_gradients(a, b, "square", [1.0, 2.0])
    with genkern.use_backend("reference"):
        exact = value_and_gradients(wide(a), wide(b), "square", [1.0, 2.0])
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=2e-6, atol=2e-6 * e.abs().max().item())


def test_the_same_bits_in_any_order(running_cuda):
    if torch.cuda.is_available():
        pytest.skip("an order is the executor's to choose")
    a, b = ([numbers(n) for n in (3 * STEP, 7)] for _ in range(2))
    results = []
    for schedule in ("sequential", "reversed", 7):
        with running_cuda(schedule):
            results.append(value_and_gradients(a, b, "square", [1.0, 2.0], 0.7))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.exhaustive
def test_derivatives(on_cuda, device):
    a, b = (numbers(3, torch.float64, device) for _ in range(2))

    def function(x, y):
        return op.differences([("a", "b")], [x], [y], "square", [0.3])

    assert torch.autograd.gradcheck(function, (a, b))
    assert torch.autograd.gradgradcheck(function, (a, b))
