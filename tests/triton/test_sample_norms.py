"""Norms of samples in Triton against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern import losses
from genkern.ops import _triton_lists
from genkern.ops.sample_norms import op

TILE = _triton_lists.TILE
FUNCTIONS = ["squares", "square", "distance", "excess", "largest"]
EPSILON = {torch.float32: 4e-6, torch.float64: 1e-13, torch.float16: 2**-9}
every_function = pytest.mark.parametrize("function", FUNCTIONS)


def numbers(*shape, dtype=torch.float32, spread=1.0):
    """Between NaNs; every second sample of a batch, so samples lie apart."""
    memory = torch.full((2 * shape[0], *shape[1:]), float("nan"), dtype=dtype)
    memory[::2] = (torch.randn(shape, dtype=torch.float64) * spread).to(dtype)
    return memory[::2].requires_grad_()


def value_and_gradients(groups, function, center=0.7, weight=1.5, upstream=3.0):
    value = op.sample_norms(groups, function, center, weight)
    upstream = torch.linspace(1, upstream, value.numel()).reshape(value.shape).to(value)
    return [
        value.detach(),
        *torch.autograd.grad(value, [x for group in groups for x in group], upstream),
    ]


def wide(groups):
    return [[x.detach().double().requires_grad_() for x in group] for group in groups]


def some_groups(function, dtype=torch.float32):
    groups = [[numbers(3, 2, 5, dtype=dtype), numbers(3, TILE + 9, dtype=dtype, spread=0.02)]]
    if function != "squares":
        groups += [[numbers(1, 7, dtype=dtype)], [numbers(9, 1, dtype=dtype)]]
    return groups


@pytest.mark.parametrize("dtype", EPSILON, ids=lambda d: str(d).removeprefix("torch."))
@every_function
def test_against_the_reference(function, dtype, on_triton, launches, poisoned):
    groups = some_groups(function, dtype)
    got = value_and_gradients(groups, function)
    assert [(c.op, c.backend) for c in on_triton] == [(op.OP, "triton"), (op.BACKWARD, "triton")]
    assert launches == ["forward_kernel", "backward_kernel"]
    with genkern.use_backend("reference"):
        exact = value_and_gradients(wide(groups), function)
    for g, e in zip(got, exact, strict=True):
        within = EPSILON[torch.float32 if dtype is torch.float16 and g.dtype != dtype else dtype]
        torch.testing.assert_close(g.double(), e, rtol=within, atol=within * e.abs().max().item())


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(0, 4),
    shape=st.lists(st.integers(0, 4), max_size=3),
    function=st.sampled_from(FUNCTIONS),
    layout=st.sampled_from(["contiguous", "strided", "expanded"]),
    spread=st.sampled_from([0.0, 1.0]),
)
def test_any_shape(batch, shape, function, layout, spread):
    if function == "largest":
        batch += 1
    x = torch.randn(batch, *shape, 2) * spread
    x = {
        "contiguous": x[..., 0].contiguous(),
        "strided": x[..., 0],
        "expanded": torch.randn(shape).expand(batch, *shape),
    }[layout].requires_grad_()
    with genkern.use_backend("triton"), genkern.explain() as log:
        got = value_and_gradients([[x]], function)
    assert {choice.backend for choice in log} == {"triton"}
    with genkern.use_backend("reference"):
        expected = value_and_gradients([[x]], function)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", ["squares", "distance"])
def test_layouts_are_kept(function, on_triton):
    x = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)[::2].requires_grad_()
    got = value_and_gradients([[x]], function)
    assert got[1].stride()[1:] == x.stride()[1:]
    with genkern.use_backend("reference"):
        torch.testing.assert_close(got, value_and_gradients([[x]], function))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_function
def test_nan_and_inf_as_eager(function, bad, on_triton):
    x = torch.randn(4, 3)
    x[2, 1] = bad
    got = value_and_gradients([[x.requires_grad_()]], function)
    with genkern.use_backend("reference"):
        expected = value_and_gradients([[x]], function)
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_no_slope_at_zero_and_equal_largest_share(on_triton):
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [4.0, 3.0], [-0.3, 0.4]], requires_grad=True)
    for function in FUNCTIONS:
        got = value_and_gradients([[x]], function, center=0.5)
        with genkern.use_backend("reference"):
            torch.testing.assert_close(got, value_and_gradients([[x]], function, center=0.5))


def test_more_samples_than_are_read_at_a_time(on_triton):
    """And more pieces, in long runs."""
    lanes = _triton_lists.LANES.value
    x = torch.randn(lanes + 1, 1, requires_grad=True)
    wide_ones = torch.randn(2, 3 * TILE + 1, requires_grad=True)
    got = value_and_gradients([[x], [wide_ones]], "largest")
    with genkern.use_backend("reference"):
        torch.testing.assert_close(got, value_and_gradients([[x], [wide_ones]], "largest"))


def test_the_same_bits_on_every_run(on_triton):
    groups = some_groups("distance")
    runs = [value_and_gradients(groups, "distance") for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_one_gradient_alone(on_triton, poisoned):
    first, second = numbers(3, 5).detach(), numbers(3, 4)
    value = op.sample_norms([[first, second]], "distance", 1.0, 2.0)
    (got,) = torch.autograd.grad(value, second)
    with genkern.use_backend("reference"):
        value = op.sample_norms([[first, second]], "distance", 1.0, 2.0)
        torch.testing.assert_close(got, torch.autograd.grad(value, second)[0])


@pytest.mark.parametrize("function", ["squares", "distance", "largest"])
def test_gradcheck(function, on_triton):
    x = numbers(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: op.sample_norms([[x]], function, 0.3, 2.0), x)


def test_a_penalty_trains(on_triton):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    penalty = losses.r1((x * x) @ w, x, gamma=10.0)
    (grad,) = torch.autograd.grad(penalty, w)
    assert ("sample_norms", "triton") in [(c.op, c.backend) for c in on_triton]
    torch.testing.assert_close(grad, 40 * (x * x).mean(0) * w)


def test_compiled(on_triton):
    function = "squares"
    groups = [[torch.randn(3, 5, requires_grad=True), torch.randn(3, 2, requires_grad=True)]]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda groups: op.sample_norms(groups, function, 0.7, 1.5), fullgraph=True
    )
    value = compiled(groups)
    upstream = torch.linspace(1, 3, value.numel()).reshape(value.shape)
    got = [value, *torch.autograd.grad(value, groups[0], upstream)]
    assert {choice.backend for choice in on_triton} == {"triton"}
    torch.testing.assert_close(got, value_and_gradients(groups, function))


def test_compiles_for_every_target(assemblies, fits):
    fits(assemblies("compile_sample_norms.py"))


@pytest.mark.exhaustive
def test_every_configuration_compiles_for_every_target(assemblies, fits):
    fits(assemblies("compile_sample_norms.py", "exhaustive"))
