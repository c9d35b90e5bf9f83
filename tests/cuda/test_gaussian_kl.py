"""KL of diagonal Gaussians in CUDA against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern.ops.gaussian_kl import cuda, op

STEP = 1024  # fp32 elements that a block takes at a time
EPSILON = {
    torch.float32: 4e-6,
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
every_reduction = pytest.mark.parametrize("reduction", op.REDUCTIONS)


def numbers(count, dtype=torch.float32, device="cpu"):
    """Between NaNs."""
    memory = torch.full((count + 9,), float("nan"), dtype=dtype)
    memory[count % 3 : count % 3 + count] = torch.randn(count, dtype=torch.float64)
    return memory.to(device)[count % 3 : count % 3 + count].requires_grad_()


def value_and_gradients(tensors, reduction, factor=3.0):
    others = [*tensors[2:], None, None][:2]
    value = op.gaussian_kl(*tensors[:2], *others, reduction)
    upstream = torch.linspace(1, factor, max(1, value.numel()))[: value.numel()]
    grads = torch.autograd.grad(value, tensors, upstream.reshape(value.shape).to(value))
    return [value.detach(), *grads]


def wide(tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_near(got, exact, dtype):
    for g, e in zip(got, exact, strict=True):
        within = EPSILON[torch.float32 if dtype.itemsize == 2 and g.dtype != dtype else dtype]
        torch.testing.assert_close(g.double(), e, rtol=within, atol=within * e.abs().max().item())


@pytest.mark.parametrize("count", [2, 4])
@every_dtype
@every_reduction
def test_against_the_reference(reduction, dtype, count, on_cuda, poisoned, device):
    tensors = [numbers(2 * STEP + 17, dtype, device) for _ in range(count)]
    got = value_and_gradients(tensors, reduction)
    assert [(c.op, c.backend) for c in on_cuda] == [(op.OP, "cuda"), (op.BACKWARD, "cuda")]
    with genkern.use_backend("reference"):
        assert_near(got, value_and_gradients(wide(tensors), reduction), dtype)


@every_reduction
def test_launches(reduction, on_cuda, launches):
    value_and_gradients([numbers(9) for _ in range(4)], reduction)
    for launch, which in zip(launches, ("forward", "backward"), strict=True):
        assert f"gaussian_kl_{which}_kernel" in launch.kernel


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    reduction=st.sampled_from(op.REDUCTIONS),
    count=st.sampled_from([2, 4]),
    layout=st.sampled_from(["contiguous", "strided", "permuted", "broadcast"]),
)
def test_any_shape(running_cuda, shape, reduction, count, layout):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [torch.randn(*shape, 2, device=device)[..., 0] for _ in range(count)]
    if layout == "contiguous":
        tensors = [x.contiguous() for x in tensors]
    elif layout == "permuted":
        tensors = [x.contiguous().permute(tuple(range(x.dim()))[::-1]) for x in tensors]
    elif layout == "broadcast" and shape:
        tensors[2:] = [x.contiguous()[:1].expand_as(x) if x.numel() else x for x in tensors[2:]]
    tensors = [x.requires_grad_() for x in tensors]
    with running_cuda() as log:
        got = value_and_gradients(tensors, reduction)
    assert {choice.backend for choice in log} == {"cuda"}
    with genkern.use_backend("reference"):
        expected = value_and_gradients(tensors, reduction)
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [2, 3, 4, 6, 8, 20, 1030])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_halves_of_channels_last(reduction, channels, dtype, on_cuda, poisoned, device):
    """An encoder's moments: rows of `channels` numbers, read where they are."""
    moments = torch.randn(2, 2 * channels, 3, 5).to(device, dtype)
    moments = moments.contiguous(memory_format=torch.channels_last)
    tensors = [x.requires_grad_() for x in moments.chunk(2, 1)]
    got = value_and_gradients(tensors, reduction)
    with genkern.use_backend("reference"):
        assert_near(got, value_and_gradients(wide(tensors), reduction), dtype)


def test_channels_last_keeps_its_layout(on_cuda, device):
    tensors = [torch.randn(2, 3, 4, 5, device=device) for _ in range(4)]
    tensors = [x.to(memory_format=torch.channels_last).requires_grad_() for x in tensors]
    got = value_and_gradients(tensors, "none")
    assert all(x.stride() == tensors[0].stride() for x in got)
    with genkern.use_backend("reference"):
        torch.testing.assert_close(got, value_and_gradients(tensors, "none"))


def test_results_in_rows_anywhere(on_cuda, device):
    """The contract's rows; an op's own results are dense."""
    mean, logvar = torch.randn(2, 5, 11, device=device)[:, :, :6]
    terms, gradient = (torch.empty(5, 9, device=device).fill_(7.0) for _ in range(2))
    given = [(x.data_ptr(), 11) for x in (mean, logvar)] + [op.NOWHERE] * 2
    problem, result = (5, 6, given, 0), (terms.data_ptr(), 9)
    cuda.forward(problem, mean, result, 0, 1.0)
    wanted = [op.NOWHERE, (gradient.data_ptr(), 9), op.NOWHERE, op.NOWHERE]
    cuda.backward(problem, mean, wanted, 0, result, 1.0)
    exact = 0.5 * (logvar.exp() + mean.square() - 1 - logvar)
    torch.testing.assert_close(terms[:, :6], exact)
    torch.testing.assert_close(gradient[:, :6], exact * 0.5 * (logvar.exp() - 1))
    assert (terms[:, 6:] == 7).all()
    assert (gradient[:, 6:] == 7).all()


def test_one_gradient_alone(on_cuda, poisoned, device):
    tensors = [numbers(9, device=device).detach() for _ in range(4)]
    for i in range(4):
        inputs = [x.clone().requires_grad_(i == at) for at, x in enumerate(tensors)]
        (got,) = torch.autograd.grad(op.gaussian_kl(*inputs, "mean"), inputs[i])
        with genkern.use_backend("reference"):
            (exact,) = torch.autograd.grad(op.gaussian_kl(*inputs, "mean"), inputs[i])
        torch.testing.assert_close(got, exact)


def test_long_runs(on_cuda, monkeypatch, device):
    monkeypatch.setattr(cuda, "BLOCKS_AIM", 2)
    tensors = [numbers(35 * STEP + 3, device=device) for _ in range(2)]
    got = value_and_gradients(tensors, "batchmean")
    with genkern.use_backend("reference"):
        assert_near(got, value_and_gradients(wide(tensors), "batchmean"), torch.float32)


def test_the_same_bits_in_any_order(running_cuda):
    if torch.cuda.is_available():
        pytest.skip("an order is the executor's to choose")
    tensors, results = [numbers(3 * STEP + 1) for _ in range(2)], []
    for schedule in ("sequential", "reversed", 7):
        with running_cuda(schedule):
            results.append(value_and_gradients(tensors, "batchmean"))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_derivatives(reduction, on_cuda, device):
    tensors = [numbers(2, torch.float64, device) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *x: op.gaussian_kl(*x, reduction), tensors)
    assert torch.autograd.gradgradcheck(lambda *x: op.gaussian_kl(*x, reduction), tensors)
