"""KL of diagonal Gaussians in Triton against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern.ops import _triton_lists
from genkern.ops.gaussian_kl import op

TILE = _triton_lists.TILE
EPSILON = {torch.float32: 4e-6, torch.float64: 1e-13, torch.float16: 2**-10}
every_reduction = pytest.mark.parametrize("reduction", op.REDUCTIONS)


def numbers(count, dtype=torch.float32):
    """Between NaNs."""
    memory = torch.full((count + 9,), float("nan"), dtype=dtype)
    part = memory[count % 3 : count % 3 + count]
    part.copy_(torch.randn(count, dtype=torch.float64))
    return part.requires_grad_()


def value_and_gradients(tensors, reduction, factor=3.0):
    others = [*tensors[2:], None, None][:2]
    value = op.gaussian_kl(*tensors[:2], *others, reduction)
    upstream = torch.linspace(1, factor, max(1, value.numel()))[: value.numel()]
    grads = torch.autograd.grad(value, tensors, upstream.reshape(value.shape).to(value))
    return [value.detach(), *grads]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("dtype", EPSILON, ids=lambda d: str(d).removeprefix("torch."))
@every_reduction
def test_against_the_reference(reduction, dtype, count, on_triton, launches, poisoned):
    tensors = [numbers(2 * TILE + 17, dtype) for _ in range(count)]
    got = value_and_gradients(tensors, reduction)
    assert [(c.op, c.backend) for c in on_triton] == [(op.OP, "triton"), (op.BACKWARD, "triton")]
    assert launches == ["forward_kernel", "backward_kernel"]
    with genkern.use_backend("reference"):
        wide = [x.detach().double().requires_grad_() for x in tensors]
        exact = value_and_gradients(wide, reduction)
    for g, e in zip(got, exact, strict=True):
        within = EPSILON[torch.float32 if dtype is torch.float16 and g.dtype != dtype else dtype]
        torch.testing.assert_close(g.double(), e, rtol=within, atol=within * e.abs().max().item())


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    reduction=st.sampled_from(op.REDUCTIONS),
    count=st.sampled_from([2, 4]),
    layout=st.sampled_from(["contiguous", "strided", "permuted", "broadcast"]),
)
def test_any_shape(shape, reduction, count, layout):
    tensors = [torch.randn(*shape, 2)[..., 0] for _ in range(count)]
    if layout == "contiguous":
        tensors = [x.contiguous() for x in tensors]
    elif layout == "permuted":
        tensors = [x.contiguous().permute(tuple(range(x.dim()))[::-1]) for x in tensors]
    elif layout == "broadcast" and shape:
        tensors[2:] = [x.contiguous()[:1].expand_as(x) if x.numel() else x for x in tensors[2:]]
    tensors = [x.requires_grad_() for x in tensors]
    with genkern.use_backend("triton"), genkern.explain() as log:
        got = value_and_gradients(tensors, reduction)
    assert {choice.backend for choice in log} == {"triton"}
    with genkern.use_backend("reference"):
        expected = value_and_gradients(tensors, reduction)
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_channels_last_keeps_its_layout(on_triton):
    tensors = [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(4)]
    got = value_and_gradients([x.requires_grad_() for x in tensors], "none")
    assert all(x.stride() == tensors[0].stride() for x in got)
    with genkern.use_backend("reference"):
        torch.testing.assert_close(got, value_and_gradients(tensors, "none"))


def test_one_gradient_alone(on_triton, poisoned):
    tensors = [numbers(9).detach() for _ in range(4)]
    for i in range(4):
        inputs = [x.clone().requires_grad_(i == at) for at, x in enumerate(tensors)]
        (got,) = torch.autograd.grad(op.gaussian_kl(*inputs, "mean"), inputs[i])
        with genkern.use_backend("reference"):
            (exact,) = torch.autograd.grad(op.gaussian_kl(*inputs, "mean"), inputs[i])
        torch.testing.assert_close(got, exact)


def test_the_same_bits_on_every_run(on_triton):
    tensors = [numbers(3 * TILE + 1) for _ in range(2)]
    runs = [value_and_gradients(tensors, "batchmean") for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_derivatives(reduction, on_triton):
    tensors = [numbers(2, torch.float64) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *x: op.gaussian_kl(*x, reduction), tensors)
    assert torch.autograd.gradgradcheck(lambda *x: op.gaussian_kl(*x, reduction), tensors)


def test_compiled(on_triton):
    tensors = [torch.randn(3, 4, requires_grad=True) for _ in range(4)]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: op.gaussian_kl(*x, "none"), fullgraph=True)
    value = compiled(*tensors)
    upstream = torch.linspace(1, 3, 12).reshape(3, 4)
    got = [value, *torch.autograd.grad(value, tensors, upstream)]
    assert {choice.backend for choice in on_triton} == {"triton"}
    torch.testing.assert_close(got, value_and_gradients(tensors, "none"))


def test_compiles_for_every_target(assemblies, fits):
    fits(assemblies("compile_gaussian_kl.py"))


@pytest.mark.exhaustive
def test_every_configuration_compiles_for_every_target(assemblies, fits):
    fits(assemblies("compile_gaussian_kl.py", "exhaustive"))
