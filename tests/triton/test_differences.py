"""Mean differences in Triton against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern import losses
from genkern.ops import _triton_lists
from genkern.ops.differences import op

TILE = _triton_lists.TILE
COUNTS = [5, TILE + 17, 1]
WEIGHTS = [1.0, 0.5, 3.0]
EPSILON = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 2**-10}
every_distance = pytest.mark.parametrize("distance", ["absolute", "square"])


def numbers(count, dtype=torch.float32):
    """Between NaNs, at an address that is not a multiple of 16 for a part of them."""
    memory = torch.full((count + 9,), float("nan"), dtype=dtype)
    part = memory[count % 3 : count % 3 + count]
    part.copy_(torch.randn(count, dtype=torch.float64))
    return part.requires_grad_()


def value_and_gradients(a, b, distance, weights, scale=1.0):
    names = [(f"a[{i}]", f"b[{i}]") for i in range(len(a))]
    value = op.differences(names, a, b, distance, weights)
    return [value.detach(), *torch.autograd.grad(value * scale, [*a, *b])]


def wide(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", EPSILON, ids=lambda d: str(d).removeprefix("torch."))
@every_distance
def test_against_the_reference(distance, dtype, on_triton, launches, poisoned):
    a, b = ([numbers(n, dtype) for n in COUNTS] for _ in range(2))
    got = value_and_gradients(a, b, distance, WEIGHTS, 3.0)
    assert [(c.op, c.backend) for c in on_triton] == [(op.OP, "triton"), (op.BACKWARD, "triton")]
    assert launches == ["forward_kernel", "backward_kernel"]
    with genkern.use_backend("reference"):
        exact = value_and_gradients(wide(a), wide(b), distance, WEIGHTS, 3.0)
    for g, e in zip(got, exact, strict=True):
        within = EPSILON[torch.float32 if dtype is torch.float16 and g.dtype != dtype else dtype]
        atol = within * e.abs().max().item()
        torch.testing.assert_close(g.double(), e, rtol=within, atol=atol)


@settings(max_examples=12, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    distance=st.sampled_from(["absolute", "square"]),
    strided=st.sampled_from(["no", "one", "both"]),
)
def test_any_shapes(shapes, distance, strided):
    a, b = ([torch.randn(*shape, 2)[..., 0] for shape in shapes] for _ in range(2))
    a = [x if strided != "no" else x.clone() for x in a]
    b = [x if strided == "both" else x.contiguous() for x in b]
    for x in (*a, *b):
        x.requires_grad_()
    with genkern.use_backend("triton"), genkern.explain() as log:
        got = value_and_gradients(a, b, distance, [1.5] * len(a))
    assert {choice.backend for choice in log} == {"triton"}
    with genkern.use_backend("reference"):
        expected = value_and_gradients(a, b, distance, [1.5] * len(a))
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_channels_last_keeps_its_layout(on_triton):
    a, b = (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
        for _ in range(2)
    )
    got = value_and_gradients([a], [b], "absolute", [1.0])
    assert got[1].stride() == a.stride()
    with genkern.use_backend("reference"):
        torch.testing.assert_close(got, value_and_gradients([a], [b], "absolute", [1.0]))


@every_distance
def test_nan_and_equal(distance, on_triton):
    a = torch.tensor([1.0, float("nan"), 0.0, 3.0], requires_grad=True)
    b = torch.tensor([1.0, 2.0, 0.0, 4.0], requires_grad=True)
    got = value_and_gradients([a], [b], distance, [1.0])
    with genkern.use_backend("reference"):
        expected = value_and_gradients([a], [b], distance, [1.0])
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_feature_matching_of_lists_of_lists(on_triton, launches):
    real = [[numbers(n).detach() for n in COUNTS[:2]] for _ in range(3)]
    fake = [[numbers(n) for n in COUNTS[:2]] for _ in range(3)]
    inputs = [x for features in fake for x in features]
    value = losses.feature_matching(real, fake)
    got = [value, *torch.autograd.grad(value, inputs)]
    assert launches == ["forward_kernel", "backward_kernel"]
    with genkern.use_backend("reference"):
        value = losses.feature_matching(real, fake)
        torch.testing.assert_close(got, [value, *torch.autograd.grad(value, inputs)])


def test_the_same_bits_on_every_run(on_triton):
    a, b = ([numbers(n) for n in (4 * TILE, 7)] for _ in range(2))
    runs = [value_and_gradients(a, b, "square", [1.0, 2.0], 0.7) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_derivatives(on_triton):
    a, b = numbers(3, torch.float64), numbers(3, torch.float64)

    def function(x, y):
        return op.differences([("a", "b")], [x], [y], "square", [0.3])

    assert torch.autograd.gradcheck(function, (a, b))
    assert torch.autograd.gradgradcheck(function, (a, b))


def test_compiled(on_triton):
    a, b = ([numbers(n) for n in (40, 7)] for _ in range(2))

    def function(x, y):
        return op.differences([("a", "b")] * 2, x, y, "square", [1.0, 2.0])

    torch._dynamo.reset()
    value = torch.compile(function, fullgraph=True)(a, b)
    got = [value, *torch.autograd.grad(value * 2, [*a, *b])]
    assert {choice.backend for choice in on_triton} == {"triton"}
    torch.testing.assert_close(got, value_and_gradients(a, b, "square", [1.0, 2.0], 2.0))


def test_compiles_for_every_target(assemblies, fits):
    fits(assemblies("compile_differences.py"))


@pytest.mark.exhaustive
def test_every_configuration_compiles_for_every_target(assemblies, fits):
    fits(assemblies("compile_differences.py", "exhaustive"))
