"""KL of diagonal Gaussians: against torch.distributions and the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import genkern
from genkern import losses
from genkern.ops._tensors import common_rows
from genkern.ops.gaussian_kl import op

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# None, one, below and around a vector, and several pieces with a ragged end.
SHAPES = [(0, 3), (1, 1), (3, 5), (2, 33), (70, 1000), (1, 70_001)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_reduction = pytest.mark.parametrize("reduction", op.REDUCTIONS)
two = pytest.mark.parametrize("two", [False, True], ids=["standard", "another"])


def gaussians(shape, two, dtype=torch.float64):
    tensors = [torch.randn(shape, dtype=torch.float64) for _ in range(4 if two else 2)]
    return [x.to(dtype).requires_grad_() for x in tensors]


def with_gradients(function, tensors, reduction):
    value = function(*tensors, reduction=reduction)
    slope = torch.linspace(0.5, 3.0, max(1, value.numel()), dtype=value.dtype)
    slope = slope[: value.numel()].view(value.shape)
    return value, *torch.autograd.grad(value, tensors, slope)


def by_torch(mean, logvar, m=None, k=None, *, reduction):
    other = Normal(torch.zeros_like(mean), 1.0) if m is None else Normal(m, (k / 2).exp())
    terms = kl_divergence(Normal(mean, (logvar / 2).exp()), other)
    return {
        "none": lambda: terms,
        "sum": lambda: terms.sum(),
        "mean": lambda: terms.mean(),
        "batchmean": lambda: terms.flatten(1).sum(1).mean(),
    }[reduction]()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@two
@every_reduction
def test_formula(reduction, two, backend, poisoned):
    tensors = gaussians((4, 3, 7), two)
    with genkern.use_backend(backend), genkern.explain() as log:
        got = with_gradients(losses.gaussian_kl, tensors, reduction)
    assert [(c.op, c.backend) for c in log] == [(op.OP, backend), (op.BACKWARD, backend)]
    expected = with_gradients(by_torch, tensors, reduction)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@two
@every_dtype
def test_exact_at_every_level(dtype, two, cpu_level, poisoned):
    """Against fp64: at most 1.25 times eager's error in the same dtype, above a floor."""
    for shape in SHAPES:
        for reduction in ("none", "batchmean"):
            tensors = gaussians(shape, two, dtype)
            with genkern.use_backend("cpu"):
                got = with_gradients(losses.gaussian_kl, tensors, reduction)
            wide = [x.detach().double().requires_grad_() for x in tensors]
            with genkern.use_backend("reference"):
                eager = with_gradients(losses.gaussian_kl, tensors, reduction)
                exact = with_gradients(losses.gaussian_kl, wide, reduction)
            for g, e, x in zip(got, eager, exact, strict=True):
                if x.numel() == 0 or not x.isfinite().all():
                    assert torch.equal(g.isnan(), x.isnan())
                    continue
                scale = max(1.0, x.abs().max().item())
                own, other = ((y.double() - x).abs().max().item() for y in (g, e))
                assert own <= 1.25 * other + FLOOR[g.dtype] * scale, (shape, own, other)
            assert got[1].dtype == dtype


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    two=st.booleans(),
    reduction=st.sampled_from(op.REDUCTIONS),
    layout=st.sampled_from(["dense", "halves", "every other", "last first", "mixed", "prior"]),
)
def test_any_shape(shape, two, reduction, layout):
    count = 4 if two else 2
    if layout == "halves" and 0 not in shape:  # an empty tensor has no halves
        channel = min(1, len(shape) - 1)
        shape[channel] *= count
        tensors = torch.randn(shape, dtype=torch.float64).chunk(count, channel)
    elif layout == "every other":
        tensors = list(torch.randn(*shape, count, dtype=torch.float64).unbind(-1))
    elif layout == "last first":
        tensors = [torch.randn(shape, dtype=torch.float64).movedim(-1, 0) for _ in range(count)]
    else:
        tensors = [torch.randn(shape, dtype=torch.float64) for _ in range(count)]
    if layout == "mixed":
        tensors[0] = tensors[0].mT.contiguous().mT if len(shape) > 1 else tensors[0]
    if layout == "prior" and two:
        tensors[2:] = [x[:1] if x.shape[0] else x for x in tensors[2:]]
    tensors = [x.detach().requires_grad_() for x in tensors]
    got = with_gradients(losses.gaussian_kl, tensors, reduction)
    with genkern.use_backend("reference"):
        expected = with_gradients(losses.gaussian_kl, tensors, reduction)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_halves_of_an_encoders_output_are_not_copied():
    for encoded in (
        torch.randn(4, 10, 3, 3),
        torch.randn(4, 10, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 10),
    ):
        mean, logvar = (x.detach().requires_grad_() for x in encoded.chunk(2, 1))
        assert common_rows([mean, logvar, torch.empty_like(mean)]) is not None
        got = with_gradients(losses.gaussian_kl, [mean, logvar], "sum")
        torch.testing.assert_close(got, with_gradients(by_torch, [mean, logvar], "sum"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@two
def test_nan_and_inf_as_eager(bad, two, cpu_level):
    for which in range(4 if two else 2):
        tensors = gaussians((3, 9), two, torch.float32)
        with torch.no_grad():
            tensors[which][1, 2] = bad
        got = with_gradients(losses.gaussian_kl, tensors, "none")
        with genkern.use_backend("reference"):
            expected = with_gradients(losses.gaussian_kl, tensors, "none")
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_the_same_bits_on_any_number_of_threads(cpu_level):
    tensors = gaussians((3, 100_001), True, torch.float32)
    results = []
    for count in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        results.append(with_gradients(losses.gaussian_kl, tensors, "mean"))
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_upstream_comes_before_rounding():
    mean, logvar = gaussians((1, 1_000_000), False, torch.float16)
    (got,) = torch.autograd.grad(losses.gaussian_kl(mean, logvar, reduction="mean") * 65536, mean)
    exact = mean.detach().double() * 65536 / 1_000_000
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-10 + 2**-25).all()


@two
@every_reduction
def test_gradcheck(reduction, two):
    tensors = gaussians((3, 2), two)

    def run(*x):
        return losses.gaussian_kl(*x, reduction=reduction)

    with genkern.use_backend("cpu"):
        assert torch.autograd.gradcheck(run, tensors)
        assert torch.autograd.gradgradcheck(run, tensors)


def test_second_derivative_says_where_it_ran():
    mean, logvar = gaussians((3, 2), False)
    with genkern.explain() as log:
        torch.autograd.grad(losses.gaussian_kl(mean, logvar), mean, create_graph=True)
    assert [(c.op, c.backend) for c in log] == [(op.OP, "cpu"), (op.BACKWARD, "reference")]


@two
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_opcheck_and_compile(reduction, two):
    tensors = gaussians((3, 5), two, torch.float32)
    padded = [*tensors, None, None][:4]
    torch.library.opcheck(torch.ops.genkern.gaussian_kl.default, (*padded, reduction))
    torch._dynamo.reset()
    compiled = torch.compile(losses.gaussian_kl, fullgraph=True)
    with genkern.explain() as log:
        got = with_gradients(compiled, tensors, reduction)
    assert {choice.backend for choice in log} == {"cpu"}
    torch.testing.assert_close(got, with_gradients(losses.gaussian_kl, tensors, reduction))


def test_only_some_gradients():
    mean, logvar, m, k = gaussians((3, 5), True)
    value = losses.gaussian_kl(mean.detach(), logvar, m.detach(), k)
    value.backward()
    assert mean.grad is None and m.grad is None
    expected = by_torch(mean, logvar, m, k, reduction="batchmean")
    torch.testing.assert_close(
        [logvar.grad, k.grad], list(torch.autograd.grad(expected, [logvar, k]))
    )


def test_transforms_are_refused():
    mean, logvar = (x.detach() for x in gaussians((3, 2), False))
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: losses.gaussian_kl(x, logvar), (mean,), (mean,))


@pytest.mark.parametrize(
    ("arguments", "options", "exception", "sentence"),
    [
        ((torch.ones(2), torch.ones(3)), {}, ValueError, r"logvar must have mean's shape, \(2,\)"),
        ((torch.ones(2), torch.ones(2).double()), {}, TypeError, "logvar must have mean's dtype"),
        ((torch.ones(2), torch.ones(2), torch.ones(2)), {}, ValueError, "both or neither"),
        (
            (torch.ones(2), torch.ones(2), torch.ones(3), torch.ones(2)),
            {},
            ValueError,
            r"other_mean must have a shape that broadcasts to mean's, \(2,\), not \(3,\)",
        ),
        (
            (torch.ones(2), torch.ones(2)),
            {"reduction": "avg"},
            ValueError,
            "reduction must be one of batchmean, sum, mean, none, not 'avg'",
        ),
    ],
)
def test_bad_arguments(arguments, options, exception, sentence):
    with pytest.raises(exception, match=sentence):
        losses.gaussian_kl(*arguments, **options)
