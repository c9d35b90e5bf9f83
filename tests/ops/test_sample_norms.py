"""Norms of samples: the kernels against an independent formula and against the reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern.ops.sample_norms import op, reference
from genkern.ops.sample_norms.op import sample_norms

FUNCTIONS = list(op.FUNCTION_NUMBER)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# No numbers, one, below and around a vector, several pieces of a sample with a ragged end.
SHAPES = [(3, 0), (1, 1), (5, 3), (4, 3, 5, 7), (2, 33), (3, 1025), (2, 70_001), (70, 1000)]

every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def numbers(*shape, dtype=torch.float64, spread=1.0):
    return (torch.randn(shape, dtype=torch.float64) * spread).to(dtype).requires_grad_()


def constants(function):
    return function, 0.8, 1.0 if function == "squares" else 2.5


def value_and_gradients(groups, function, upstream=3.0):
    value = sample_norms(groups, *constants(function))
    inputs = [x for group in groups for x in group]
    grads = torch.autograd.grad(value, inputs, torch.full_like(value, upstream))
    return value, *grads


def by_reference(*args, **kwargs):
    with genkern.use_backend("reference"):
        return value_and_gradients(*args, **kwargs)


def independent(groups, function, center, weight):
    """By other functions than the reference uses, sample by sample."""
    total = 0
    for group in groups:
        norms = torch.stack(
            [sum((x[i] * x[i]).sum() for x in group).sqrt() for i in range(len(group[0]))]
        )
        if function == "squares":
            return norms**2
        total = total + {
            "square": lambda n: (n**2).mean(),
            "distance": lambda n: ((n - center) ** 2).mean(),
            "excess": lambda n: (torch.clamp(n - center, min=0) ** 2).mean(),
            "largest": lambda n: n.max() ** 2,
        }[function](norms)
    return weight * total


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_function
def test_formula(function, backend):
    groups = [[numbers(6, 5, 3), numbers(6, 2)], [numbers(3, 4)]]
    groups = groups[:1] if function == "squares" else groups
    with genkern.use_backend(backend), genkern.explain() as log:
        got = value_and_gradients(groups, function)
    assert [(c.op, c.backend) for c in log] == [(op.OP, backend), (op.BACKWARD, backend)]
    value = independent(groups, *constants(function))
    inputs = [x for group in groups for x in group]
    exact = value, *torch.autograd.grad(value, inputs, torch.full_like(value, 3.0))
    torch.testing.assert_close(got, exact, rtol=1e-13, atol=1e-13)


@every_dtype
@every_function
def test_exact_at_every_level(function, dtype, cpu_level, poisoned):
    """Against fp64: at most 1.25 times eager's error in the same dtype, above a floor."""
    for shape in SHAPES:
        groups = [[numbers(*shape, dtype=dtype, spread=0.3)]]
        with genkern.use_backend("cpu"):
            got = value_and_gradients(groups, function)
        eager = by_reference(groups, function)
        wide = [[x.detach().double().requires_grad_() for x in groups[0]]]
        exact = by_reference(wide, function)
        for g, e, x in zip(got, eager, exact, strict=True):
            scale = x.abs().max().item() if x.numel() else 0.0
            own, other = ((y.double() - x).abs().max().item() if x.numel() else 0.0 for y in (g, e))
            assert own <= 1.25 * other + FLOOR[g.dtype] * max(scale, 1.0), (shape, own, other)
        assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert got[1].dtype == dtype


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 4),
    shape=st.lists(st.integers(0, 5), max_size=3),
    function=st.sampled_from(FUNCTIONS),
    dtype=st.sampled_from(DTYPES[:2]),
    layout=st.sampled_from(["dense", "every other", "part of a batch", "last first"]),
    spread=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_any_shape(batch, shape, function, dtype, layout, spread):
    if function == "largest" and batch == 0:
        return
    base = numbers(2 * batch, *shape, 2, dtype=dtype, spread=spread).detach()
    x = {
        "dense": lambda: base[:batch, ..., 0].clone(),
        "every other": lambda: base[:batch, ..., 0],
        "part of a batch": lambda: base.flatten(1)[::2] if shape else base[::2],
        "last first": lambda: base[:batch].movedim(-1, 1),
    }[layout]()
    x.requires_grad_()
    got = value_and_gradients([[x]], function)
    expected = by_reference([[x]], function)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("function", ["squares", "distance"])
def test_layouts_are_kept(function):
    image = numbers(3, 4, 5, 6, dtype=torch.float32).detach()
    image = image.contiguous(memory_format=torch.channels_last).requires_grad_()
    half = numbers(3, 8, dtype=torch.float32).detach()[:, :4].requires_grad_()
    # Neither is copied.
    assert op.with_dense_samples(image) is image and op.with_dense_samples(half) is half
    _, got = value_and_gradients([[image]], function)
    assert got.stride() == image.stride()
    torch.testing.assert_close(got, by_reference([[image]], function)[1])
    _, got = value_and_gradients([[half]], function)
    assert got.is_contiguous()
    torch.testing.assert_close(got, by_reference([[half]], function)[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_function
def test_nan_and_inf_as_eager(function, bad, cpu_level):
    x = numbers(4, 20, dtype=torch.float32)
    with torch.no_grad():
        x[1, 3] = bad
    got, expected = value_and_gradients([[x]], function), by_reference([[x]], function)
    if function == "largest":
        # Eager's inf: the whole batch's gradient becomes NaN through 0 · inf; only values agree.
        got, expected = got[:1], expected[:1]
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, equal_nan=True)


def test_no_slope_at_zero_and_at_the_center():
    x = torch.zeros(2, 3, requires_grad=True)
    for function in ("distance", "excess"):
        _, grad = value_and_gradients([[x]], function)
        assert torch.equal(grad, torch.zeros(2, 3))


def test_equal_largest_samples_share_the_slope():
    x = torch.ones(4, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(sample_norms([[x]], "largest"), x)
    torch.testing.assert_close(grad, torch.full((4, 2), 0.5))


@every_function
def test_the_same_bits_on_any_number_of_threads(function, cpu_level):
    groups = [[numbers(3, 150_001, dtype=torch.float32), numbers(3, 17, dtype=torch.float32)]]
    results = []
    for count in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        results.append(value_and_gradients(groups, function))
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_upstream_comes_before_rounding():
    x = numbers(3, 1000, dtype=torch.float16, spread=1e-4)
    (got,) = torch.autograd.grad(sample_norms([[x]], "square") * 65536.0, x)
    exact = x.detach().double() * (2 * 65536 / 3)
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-10 + 2**-25).all()


@every_function
def test_gradcheck(function):
    a, b = numbers(3, 4), numbers(3, 2)

    def run(x, y):
        return sample_norms([[x, y]], *constants(function))

    with genkern.use_backend("cpu"):
        assert torch.autograd.gradcheck(run, (a, b))
        assert torch.autograd.gradgradcheck(run, (a, b))


def test_second_derivative_says_where_it_ran():
    x = numbers(3, 4)
    with genkern.explain() as log:
        torch.autograd.grad(sample_norms([[x]], "square"), x, create_graph=True)
    assert [(c.op, c.backend) for c in log] == [(op.OP, "cpu"), (op.BACKWARD, "reference")]


@pytest.mark.parametrize("function", ["squares", "distance"])
def test_opcheck(function):
    tensors = [numbers(3, 4, dtype=torch.float32), numbers(3, 2, dtype=torch.float32)]
    arguments = [2], function, 0.8, 2.5
    torch.library.opcheck(torch.ops.genkern.sample_norms.default, (tensors, *arguments))
    plain = [x.detach() for x in tensors]
    value, sums = torch.ops.genkern.sample_norms(plain, *arguments)
    torch.library.opcheck(
        torch.ops.genkern.sample_norms_backward.default,
        (torch.ones_like(value), plain, sums, *arguments),
    )


@every_function
def test_compiled(function):
    a, b = numbers(3, 40, dtype=torch.float32), numbers(3, 2, dtype=torch.float32)
    eager = value_and_gradients([[a, b]], function)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: sample_norms([[x, y]], *constants(function)), fullgraph=True
    )
    with genkern.explain() as log:
        value = compiled(a, b)
        grads = torch.autograd.grad(value, [a, b], torch.full_like(value, 3.0))
    assert {choice.backend for choice in log} == {"cpu"}
    torch.testing.assert_close([value, *grads], list(eager))


def test_transforms_are_refused():
    x = numbers(3, 4).detach()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: sample_norms([[x]], "square"), (x,), (x,))


@pytest.mark.parametrize(
    ("groups", "function", "exception", "sentence"),
    [
        ([], "square", ValueError, "groups must hold at least one tensor each"),
        ([[torch.ones(2, 3), torch.ones(3, 3)]], "square", ValueError, r"\(2, 3\), \(3, 3\)"),
        ([[torch.ones(())]], "square", ValueError, "first dimension"),
        ([[torch.ones(2).long()]], "square", TypeError, r"gradients\[0\] must be of a floating"),
        ([[torch.ones(0, 3)]], "largest", ValueError, "no largest norm of no samples"),
    ],
)
def test_bad_arguments(groups, function, exception, sentence):
    with pytest.raises(exception, match=sentence):
        sample_norms(groups, function)


def test_reference_differentiates_any_number_of_times():
    x = numbers(3, 4)
    for function in itertools.islice(FUNCTIONS, 1, None):
        assert torch.autograd.gradgradcheck(
            lambda y, f=function: reference.sample_norms([[y]], f, 0.5, 2.0), (x,)
        )
