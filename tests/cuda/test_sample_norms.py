"""Norms of samples in CUDA against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern import losses
from genkern.ops.sample_norms import cuda, op

STEP = 1024  # fp32 elements that a block takes at a time
FUNCTIONS = ["squares", "square", "distance", "excess", "largest"]
EPSILON = {
    torch.float32: 4e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-9,
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
every_function = pytest.mark.parametrize("function", FUNCTIONS)


def numbers(*shape, dtype=torch.float32, spread=1.0, device="cpu"):
    """Between NaNs; every second sample of a batch, so samples lie apart."""
    memory = torch.full((2 * shape[0], *shape[1:]), float("nan"), dtype=dtype)
    memory[::2] = (torch.randn(shape, dtype=torch.float64) * spread).to(dtype)
    return memory.to(device)[::2].requires_grad_()


def value_and_gradients(groups, function, center=0.7, weight=1.5, upstream=3.0):
    value = op.sample_norms(groups, function, center, weight)
    upstream = torch.linspace(1, upstream, value.numel()).reshape(value.shape).to(value)
    return [
        value.detach(),
        *torch.autograd.grad(value, [x for group in groups for x in group], upstream),
    ]


def wide(groups):
    return [[x.detach().double().requires_grad_() for x in group] for group in groups]


def assert_near(got, exact, dtype):
    for g, e in zip(got, exact, strict=True):
        within = EPSILON[torch.float32 if dtype.itemsize == 2 and g.dtype != dtype else dtype]
        torch.testing.assert_close(g.double(), e, rtol=within, atol=within * e.abs().max().item())


def some_groups(function, dtype=torch.float32, device="cpu"):
    def some(*shape, **options):
        return numbers(*shape, dtype=dtype, device=device, **options)

    groups = [[some(3, 2, 5), some(3, STEP + 9, spread=0.02), some(3, 8)]]
    if function != "squares":
        groups += [[some(1, 7)], [some(9, 1)]]
    return groups


@every_dtype
@every_function
def test_against_the_reference(function, dtype, on_cuda, poisoned, device):
    groups = some_groups(function, dtype, device)
    got = value_and_gradients(groups, function)
    assert [(c.op, c.backend) for c in on_cuda] == [(op.OP, "cuda"), (op.BACKWARD, "cuda")]
    with genkern.use_backend("reference"):
        assert_near(got, value_and_gradients(wide(groups), function), dtype)


def test_launches(on_cuda, launches):
    value_and_gradients(some_groups("distance"), "distance")
    for launch, which in zip(launches, ("forward", "backward"), strict=True):
        assert f"sample_norms_{which}_kernel" in launch.kernel


@settings(max_examples=20, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.integers(0, 9), min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    ),
    function=st.sampled_from(FUNCTIONS),
    center=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_groups(running_cuda, groups, function, center):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if function == "squares":
        groups = groups[:1]
    if function == "largest":
        groups = [(max(1, samples), sizes) for samples, sizes in groups]
    tensors = [
        [torch.randn(samples, size, device=device, requires_grad=True) for size in sizes]
        for samples, sizes in groups
    ]
    with running_cuda() as log:
        got = value_and_gradients(tensors, function, center)
    assert {choice.backend for choice in log} == {"cuda"}
    with genkern.use_backend("reference"):
        expected = value_and_gradients(tensors, function, center)
    torch.testing.assert_close(got, expected, equal_nan=True)


@every_function
def test_channels_last_keeps_its_layout(function, on_cuda, device):
    x = torch.randn(6, 3, 2, 5, device=device).to(memory_format=torch.channels_last)[::2]
    x.requires_grad_()
    got = value_and_gradients([[x]], function)
    assert got[1].stride()[1:] == x.stride()[1:]
    with genkern.use_backend("reference"):
        torch.testing.assert_close(got, value_and_gradients([[x]], function))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_function
def test_nan_and_inf_as_eager(function, bad, on_cuda, device):
    x = torch.randn(4, 3, device=device)
    x[2, 1] = bad
    got = value_and_gradients([[x.requires_grad_()]], function)
    with genkern.use_backend("reference"):
        expected = value_and_gradients([[x]], function)
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_no_slope_at_zero_and_equal_largest_share(on_cuda, device):
    rows = [[0.0, 0.0], [3.0, 4.0], [4.0, 3.0], [-0.3, 0.4]]
    x = torch.tensor(rows, device=device, requires_grad=True)
    for function in FUNCTIONS:
        got = value_and_gradients([[x]], function, center=0.5)
        with genkern.use_backend("reference"):
            torch.testing.assert_close(got, value_and_gradients([[x]], function, center=0.5))


@pytest.mark.parametrize("function", ["distance", "largest"])
def test_more_samples_than_a_block_has_threads(function, on_cuda, device):
    """And more pieces of a sample than a warp has."""
    x = torch.randn(300, 1, device=device, requires_grad=True)
    y = torch.randn(2, 35 * STEP + 1, device=device, requires_grad=True)
    z = torch.randn(2, 3, device=device, requires_grad=True)
    got = value_and_gradients([[x], [y, z]], function)
    with genkern.use_backend("reference"):
        assert_near(got, value_and_gradients(wide([[x], [y, z]]), function), torch.float32)


def test_more_items_than_go_with_a_launch(on_cuda, device):
    groups = [[torch.randn(1 + i % 3, 5, device=device, requires_grad=True)] for i in range(40)]
    got = value_and_gradients(groups, "distance")
    with genkern.use_backend("reference"):
        assert_near(got, value_and_gradients(wide(groups), "distance"), torch.float32)


def test_long_runs(on_cuda, monkeypatch, device):
    monkeypatch.setattr(cuda, "BLOCKS_AIM", 2)
    x = torch.randn(2, 19 * STEP + 3, device=device, requires_grad=True)
    got = value_and_gradients([[x]], "distance")
    with genkern.use_backend("reference"):
        assert_near(got, value_and_gradients(wide([[x]]), "distance"), torch.float32)


def test_the_same_bits_in_any_order(running_cuda):
    if torch.cuda.is_available():
        pytest.skip("an order is the executor's to choose")
    groups, results = some_groups("distance"), []
    for schedule in ("sequential", "reversed", 7):
        with running_cuda(schedule):
            results.append(value_and_gradients(groups, "distance"))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_one_gradient_alone(on_cuda, poisoned, device):
    first, second = numbers(3, 5, device=device).detach(), numbers(3, 4, device=device)
    value = op.sample_norms([[first, second]], "distance", 1.0, 2.0)
    (got,) = torch.autograd.grad(value, second)
    with genkern.use_backend("reference"):
        value = op.sample_norms([[first, second]], "distance", 1.0, 2.0)
        torch.testing.assert_close(got, torch.autograd.grad(value, second)[0])


def test_a_penalty_trains(on_cuda, device):
    x = torch.randn(4, 3, device=device, requires_grad=True)
    w = torch.randn(3, device=device, requires_grad=True)
    penalty = losses.r1((x * x) @ w, x, gamma=10.0)
    (grad,) = torch.autograd.grad(penalty, w)
    assert ("sample_norms", "cuda") in [(c.op, c.backend) for c in on_cuda]
    torch.testing.assert_close(grad, 40 * (x * x).mean(0) * w)


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", ["squares", "distance", "largest"])
def test_gradcheck(function, on_cuda, device):
    x = numbers(2, 3, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda x: op.sample_norms([[x]], function, 0.3, 2.0), x)
