"""Spectral normalization in Triton: the kernels, interpreted, against the reference in fp64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import genkern
from genkern.ops._triton import recording
from genkern.ops.spectral_norm import op, reference
from genkern.ops.spectral_norm.blocks import LEAST_BYTES, Blocks
from genkern.ops.spectral_norm.triton import backward, forward, layers

# The interpreter computes with numpy, which says of NaN and inf what torch does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.float16: 2**-11}
every_order = pytest.mark.parametrize("order", reference.ORDERS)

# (shape, dim): one element, row, column; rows outermost, between, innermost; nothing at all; and
# sums that are split among programs, with LEAST_STEPS = 1: over columns and rows of each kind.
TINY = [((1, 1), 0), ((5, 3), 0), ((6, 5), 1), ((7, 5, 3), 1), ((9, 4, 3), 2), ((33, 1), 0)]
EMPTY = [((0, 5), 0), ((5, 0), 0), ((0, 3, 2), 1), ((3, 0, 2), 1)]
SPLIT = [((33, 300), 0), ((150, 65), 0), ((3, 130, 2, 2), 1), ((70, 33, 2, 2), 1), ((130, 35), 1)]


@pytest.fixture
def other_sizes(monkeypatch):
    """other_sizes(NAME=number, …) changes what decides how layers are cut."""

    def forget():
        for module in (forward, backward):
            module._plan.cache_clear()

    def change(**numbers):
        forget()
        for name, number in numbers.items():
            for module in (layers, forward, backward):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, number)

    yield change
    forget()


def guarded(x, offset=4):
    """The same in the same strides, in the midst of NaN, `offset` elements into its memory."""
    memory = torch.full((x.numel() + 2 * offset,), math.nan, dtype=x.dtype)
    return memory.as_strided(x.shape, torch.empty_like(x).stride(), offset).copy_(x)


def network(shapes, dtype=torch.float64, offset=4, vectors_dtype=None):
    """(weights, us, vs, dims): weights away from zero mean, a random v and the u that fits it."""
    weights, us, vs, dims = [], [], [], []
    for shape, dim in shapes:
        weight = torch.randn(shape, dtype=torch.float64) + 0.3
        columns = math.prod(shape[:dim]) * math.prod(shape[dim + 1 :])
        v = F.normalize(torch.randn(columns, dtype=torch.float64), dim=0)
        product = reference.as_matrix(weight, dim) @ v if weight.numel() else v.new_zeros(1)
        u = F.normalize(product, dim=0) if weight.numel() else v.new_zeros(shape[dim])
        weights.append(guarded(weight.to(dtype), offset).requires_grad_())
        us.append(guarded(u.to(vectors_dtype or dtype), offset))
        vs.append(guarded(v.to(vectors_dtype or dtype), offset))
        dims.append(dim)
    return weights, us, vs, dims


def cotangents_of(weights):
    return [torch.randn(w.shape).double() for w in weights], torch.randn(len(weights)).double()


def run(weights, us, vs, dims, cotangents=None, backend="triton", **options):
    """([Ŵ of all, u of all, v of all, σ], gradients) by the backend that was asked for."""
    with genkern.use_backend(backend), genkern.explain() as log:
        call = op.spectral_norm(weights, us, vs, dims, **options)
        grads = []
        if cotangents is not None:
            of_weights, of_sigma = cotangents
            of_weights = [guarded(laid_out_as(w, g)) for w, g in zip(weights, of_weights, strict=1)]
            outputs = [*call.weights, call.sigma]
            of_sigma = of_sigma.to(call.sigma.dtype)
            grads = list(torch.autograd.grad(outputs, weights, [*of_weights, of_sigma]))
    assert [choice.backend for choice in log] == [backend] * (2 if grads else 1), log
    new_us, new_vs = op.split_state(call.state, us, vs)
    return [x.detach() for x in (*call.weights, *new_us, *new_vs, call.sigma)], grads


def laid_out_as(weight, grad):
    return torch.empty_like(weight).detach().copy_(grad)


def exactly(weights, us, vs, dims, cotangents, **options):
    wide = [w.detach().double().requires_grad_() for w in weights]
    us, vs = [u.double() for u in us], [v.double() for v in vs]
    return run(wide, us, vs, dims, cotangents, backend="reference", **options)


def assert_exact(arguments, cotangents, **options):
    """At most 1.25 times the error of eager PyTorch in the same dtype, above the dtype's floor."""
    dtype = arguments[0][0].dtype
    got, grads = run(*arguments, cotangents, **options)
    eager, eager_grads = run(*arguments, cotangents, backend="reference", **options)
    exact, exact_grads = exactly(*arguments, cotangents, **options)
    # The terms of a gradient cancel, to nothing where W is 1×1.
    sigmas, (of_weights, of_sigmas) = exact[-1].tolist(), cotangents
    terms = [
        (g.abs().max().item() / abs(s) if g.numel() and s else 0) + abs(t.item())
        for g, s, t in zip(of_weights, sigmas, of_sigmas, strict=True)
    ]
    scales = [x.abs().max().item() if x.numel() else 0 for x in exact] + terms
    for g, e, x, scale in zip(
        got + grads, eager + eager_grads, exact + exact_grads, scales, strict=True
    ):
        assert g.shape == x.shape
        if x.numel():
            of_eager = (e.double() - x).abs().max().item()
            error = (g.double() - x).abs().max().item()
            assert error <= 1.25 * of_eager + FLOOR[dtype] * scale, (x.shape, error, of_eager)


# ---- Meaning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "order"),
    [
        (torch.float32, "u_first"),
        (torch.float32, "v_first"),
        (torch.float64, "u_first"),
        (torch.float16, "v_first"),
    ],
)
def test_exact(dtype, order, poisoned, other_sizes):
    """0, 1 and 3 iterations in one list."""
    other_sizes(LEAST_STEPS=1)
    shapes = TINY + EMPTY + SPLIT
    arguments = network(shapes, dtype)
    iterations = [(0, 1, 3)[i % 3] for i in range(len(shapes))]
    cotangents = cotangents_of(arguments[0])
    assert_exact(arguments, cotangents, n_power_iterations=iterations, order=order)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", FLOOR, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("offset", [3, 8])
@every_order
def test_exact_on_the_whole_grid(dtype, order, n, offset, poisoned):
    shapes = [*TINY, *EMPTY, *SPLIT, ((1, 5000), 0), ((3000, 10), 0), ((128, 128, 3, 3), 0)]
    arguments = network([*shapes, ((64, 96, 4, 4), 1), ((2, 3, 4, 5), 2)], dtype, offset)
    cotangents = cotangents_of(arguments[0])
    assert_exact(arguments, cotangents, n_power_iterations=n, order=order)


def test_a_very_large_weight(other_sizes, poisoned):
    """Few programs with many loops, as only such weights have them; nothing is left for the last
    loops of some."""
    other_sizes(FLAT_PROGRAMS=2)
    arguments = network([((150, 170), 0), ((13, 1030), 0), ((5, 3), 0)], torch.float32)
    assert_exact(arguments, cotangents_of(arguments[0]))


@every_order
def test_a_layer_is_what_it_is_alone(order):
    weights, us, vs, dims = network(TINY[:3] + SPLIT[:1], torch.float32)
    iterations, count = [0, 1, 3, 1], 4
    together, _ = run(weights, us, vs, dims, n_power_iterations=iterations, order=order)
    for i, n in enumerate(iterations):
        alone, _ = run([weights[i]], [us[i]], [vs[i]], [dims[i]], n_power_iterations=n, order=order)
        for got, kind in zip(alone[:3], (0, count, 2 * count), strict=True):
            assert torch.equal(together[kind + i], got)


def test_sigma_is_the_largest_singular_value():
    """Independent of the reference: many iterations find what the SVD finds."""
    weights, us, vs, dims = network([((8, 3, 3), 0)])
    with torch.no_grad():
        weights[0].add_(3)  # one value far above the others, which is found soon
    got, _ = run(weights, us, vs, dims, n_power_iterations=15)
    top = torch.linalg.matrix_norm(reference.as_matrix(weights[0], 0), 2)
    torch.testing.assert_close(got[-1][0], top.detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e-13, 1e20, math.nan, math.inf])
@every_order
def test_clamped_and_extreme_weights(order, scale):
    """Where eps clamps, where squares leave fp32's range, and where torch gives NaN: fp32 gives
    what fp64 gives."""
    weights, us, vs, dims = network([((6, 5), 0), ((3, 4, 5), 1), ((70, 40), 0)], torch.float32)
    with torch.no_grad():
        for weight in weights:
            if 0 <= scale < math.inf:
                weight.mul_(scale)
            else:
                weight[0].fill_(scale)
    for n in (0, 1):
        got, _ = run(weights, us, vs, dims, n_power_iterations=n, order=order)
        wide = [[x.detach().double() for x in xs] for xs in (weights, us, vs)]
        exact, _ = run(*wide, dims, backend="reference", n_power_iterations=n, order=order)
        for g, x in zip(got, exact, strict=True):
            finite = x[x.isfinite()].abs()
            atol = 1e-5 * finite.max().item() if len(finite) else 0.0
            torch.testing.assert_close(g.double(), x, rtol=1e-4, atol=atol, equal_nan=True)


@pytest.mark.parametrize("eps", [1e-3, 0.5, 30.0])
@every_order
def test_large_eps(order, eps):
    """eps at the size of the norms: clamps one of the two, or both, or none."""
    arguments = network([*TINY[1:4], ((40, 35), 0)])
    options = {"n_power_iterations": 2, "order": order, "eps": eps}
    assert_exact(arguments, cotangents_of(arguments[0]), **options)


# ---- Launches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 40])
@pytest.mark.parametrize(("iterations", "count"), [(0, 2), (1, 3), (3, 7)])
def test_launches(iterations, count, copies):
    """As many as the iterations need, whatever the number of layers."""
    weights, us, vs, dims = network((TINY + EMPTY) * copies)
    n = [iterations if i % 2 == 0 else 0 for i in range(len(weights))]
    with genkern.use_backend("triton"), recording("sm_90") as launches:
        result = op.spectral_norm(weights, us, vs, dims, n_power_iterations=n)
        assert len(launches) == count
        outputs = [*result.weights, result.sigma]
        torch.autograd.grad(outputs, weights, [torch.ones_like(x) for x in outputs])
    assert len(launches) == count + 2


def test_more_rows_than_the_kernels_count():
    with pytest.raises(ValueError, match=r"less than 1073741824 rows and columns, .* 5 columns"):
        layers.matrix_of(1, 2**31, 5)


# ---- Memory -------------------------------------------------------------------------------------


def strided(weight, how):
    """The same numbers in other strides."""
    if how == "channels_last":
        return weight.contiguous(memory_format=torch.channels_last)
    if how == "transposed":
        return weight.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "swapped":
        return weight.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "sliced":
        return torch.stack([weight, weight], dim=-1)[..., 0]
    return torch._neg_view(-weight)


@pytest.mark.parametrize("how", ["channels_last", "transposed", "swapped", "sliced", "negated"])
def test_strides(how, poisoned):
    """Weights, gradients and vectors; the results have the weights' strides."""
    weights, us, vs, dims = network([((12, 5, 3, 4), 0), ((6, 7, 4, 4), 1)])
    cotangents = cotangents_of(weights)
    expected, expected_grads = exactly(weights, us, vs, dims, cotangents)
    other = [strided(w.detach(), how).requires_grad_() for w in weights]
    us, vs = ([torch.stack([x, x], 1)[:, 0] for x in xs] for xs in (us, vs))
    got, grads = run(other, us, vs, dims, cotangents, update=True)
    for g, e in zip(got + grads, expected + expected_grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)
    for x, e in zip((*us, *vs), expected[2:6], strict=True):
        torch.testing.assert_close(x, e, rtol=1e-12, atol=1e-12)
    for result, gradient, weight in zip(got, grads, other, strict=False):
        assert result.stride() == gradient.stride() == torch.empty_like(weight).stride()


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.lists(st.integers(0, 40), min_size=2, max_size=4),
    dim=st.integers(0, 3),
    dtype=st.sampled_from(list(FLOOR)),
    order=st.sampled_from(reference.ORDERS),
    n=st.integers(0, 2),
    permutation=st.permutations(range(4)),
    offset=st.integers(0, 16),
    seed=st.integers(0, 2**31),
)
def test_any_shape_in_any_memory(shape, dim, dtype, order, n, permutation, offset, seed, poisoned):
    torch.manual_seed(seed)
    dim %= len(shape)
    while math.prod(shape) > 20000:
        shape = [x // 2 for x in shape]
    weights, us, vs, dims = network([(tuple(shape), dim), ((9, 4), 0)], dtype, offset)
    outwards = [i for i in permutation if i < len(shape)]
    back = [outwards.index(i) for i in range(len(shape))]
    other = weights[0].detach().permute(outwards).contiguous().permute(back)
    weights[0] = guarded(other, offset).requires_grad_()
    cotangents = cotangents_of(weights)
    assert_exact((weights, us, vs, dims), cotangents, n_power_iterations=n, order=order)


@pytest.mark.parametrize(
    ("dtype", "vectors", "order"),
    [
        (torch.float32, torch.float32, "v_first"),
        (torch.float64, torch.float64, "u_first"),
        (torch.float16, torch.float16, "u_first"),
        (torch.float16, torch.float32, "v_first"),
    ],
)
def test_update(dtype, vectors, order, poisoned):
    """The new vectors also go where the old ones were, in their dtype, and autograd is told."""
    shapes = [TINY[1], TINY[3], SPLIT[1], TINY[2], EMPTY[0]]
    weights, us, vs, dims = network(shapes, dtype, vectors_dtype=vectors)
    n = [(1, 0, 2)[i % 3] for i in range(len(shapes))]
    before = [x.clone() for x in (*us, *vs)]
    versions = [x._version for x in (*us, *vs)]
    expected, _ = run(weights, us, vs, dims, n_power_iterations=n, order=order)
    assert all(torch.equal(x, old) for x, old in zip((*us, *vs), before, strict=True))
    assert versions == [x._version for x in (*us, *vs)]
    got, _ = run(weights, us, vs, dims, n_power_iterations=n, order=order, update=True)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    for x, e in zip((*us, *vs), expected[len(us) : 3 * len(us)], strict=True):
        assert torch.equal(x, e.to(vectors))
    assert all(x._version > version for x, version in zip((*us, *vs), versions, strict=True))


def test_a_models_memory_is_where_its_weights_are():
    """`Blocks` is for the CPU: what a GPU's weights get must not come from it."""
    large = torch.empty(LEAST_BYTES, dtype=torch.uint8, device="meta")
    assert Blocks().empty_like(large).device == large.device


# ---- Autograd -----------------------------------------------------------------------------------

SMALL = [((3, 2), 0), ((2, 2, 2), 1)]


def function(weights, us, vs, dims):
    result = op.spectral_norm(weights, us, vs, dims, n_power_iterations=0)
    return *result.weights, result.sigma


def library(weights, us, vs, dims):
    none = [0] * len(weights)
    weights, sigma, _ = torch.ops.genkern.spectral_norm(weights, us, vs, dims, none, 0.0, "u_first")
    return *weights, sigma


@pytest.mark.parametrize("call", [function, library])
def test_gradcheck_and_gradgradcheck(call, on_triton):
    """Second derivatives are the reference's, of what the kernels gave."""
    weights, *rest = network(SMALL)
    assert torch.autograd.gradcheck(lambda *w: call(list(w), *rest), weights, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *w: call(list(w), *rest), weights, fast_mode=True)
    assert {c.backend for c in on_triton if c.op == "spectral_norm"} == {"triton"}
    assert "reference" in {c.backend for c in on_triton if c.op == "spectral_norm.backward"}


def test_missing_cotangents(on_triton):
    """A frozen weight, an unused Ŵ, only σ."""
    weights, us, vs, dims = network([*SMALL, ((5, 6), 0)])
    weights[1].requires_grad_(False)
    result = op.spectral_norm(weights, us, vs, dims, n_power_iterations=0)
    first, third = weights[0], weights[2]
    options = {"retain_graph": True, "allow_unused": True}
    grads = torch.autograd.grad(result.weights[2].sum(), [first, third], **options)
    assert grads[0] is None
    matrix = [third.detach().requires_grad_()]
    exact = reference.spectral_norm(matrix, [us[2]], [vs[2]], [0], [0], 1e-12, "u_first")[0][0]
    torch.testing.assert_close(grads[1], torch.autograd.grad(exact.sum(), matrix)[0])
    (of_sigma,) = torch.autograd.grad(result.sigma[0], first, **options)
    torch.testing.assert_close(of_sigma, torch.outer(us[0], vs[0]))
    assert [c.backend for c in on_triton] == ["triton"] * 3


def test_backward_after_the_weights_have_changed(on_triton):
    """Two forwards before one backward; an optimizer's step between forward and backward, twice."""
    weights, us, vs, dims = network(SMALL)
    before = [x.clone() for x in (*us, *vs)]

    def loss():
        for x, old in zip((*us, *vs), before, strict=True):
            x.copy_(old)
        results = [op.spectral_norm(weights, us, vs, dims, update=True) for _ in range(2)]
        return sum((w**3).sum() for result in results for w in result.weights)

    with genkern.use_backend("reference"):
        expected = torch.autograd.grad(loss(), weights)
    value = loss()
    with torch.no_grad():
        for weight in weights:
            weight.mul_(-3)
    for keep in (True, False):
        got = torch.autograd.grad(value, weights, retain_graph=keep)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("update", [False, True])
def test_compile(update, on_triton):
    """Outputs, gradients and updated vectors as eager's: the library op."""
    weights, us, vs, dims = network(SMALL)
    other = [x.clone() for x in us], [x.clone() for x in vs]

    def step(us, vs):
        result = op.spectral_norm(weights, us, vs, dims, update=update)
        return [*result.weights, result.sigma]

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(us, vs)
    expected = step(*other)
    for g, e in zip((*got, *us, *vs), (*expected, *other[0], *other[1]), strict=True):
        torch.testing.assert_close(g, e)
    cotangents = [torch.randn_like(x) for x in expected]
    for g, e in zip(
        torch.autograd.grad(got, weights, cotangents),
        torch.autograd.grad(expected, weights, cotangents),
        strict=True,
    ):
        torch.testing.assert_close(g, e)
    assert [c.backend for c in on_triton] == ["triton"] * 4


def test_a_normalised_model(on_triton):
    """`genkern.spectral_norm`: training steps, then eval, which leaves the vectors alone."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ConvTranspose2d(6, 9, 3), nn.Flatten(), nn.Linear(225, 80)
    ).to("cuda" if torch.cuda.is_available() else "cpu", torch.float64)
    ones = torch.ones_like(model[0].bias[:1]).expand(1, 2, 5, 5)
    with genkern.use_backend("reference"):  # the iterations of the beginning
        model = genkern.spectral_norm(model, recurse=True)
        other = copy.deepcopy(model)
    on_triton.clear()

    def steps(model):
        found = []
        for _ in range(2):
            model(ones).square().sum().backward()
            found += [p.grad.clone() for p in model.parameters()]
        model.eval()
        buffers = [b.clone() for b in model.buffers()]
        found.append(model(ones))
        assert all(torch.equal(b, old) for b, old in zip(model.buffers(), buffers, strict=True))
        return found + buffers

    got = steps(model)
    assert [(c.op, c.backend) for c in on_triton] == [
        ("spectral_norm", "triton"),
        ("spectral_norm.backward", "triton"),
    ] * 2 + [("spectral_norm", "triton")]
    with genkern.use_backend("reference"):
        expected = steps(other)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


# ---- What the kernels compile to ----------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["bfloat16"],
        pytest.param(["float32,float64,bfloat16,float16", "all"], marks=pytest.mark.exhaustive),
    ],
)
def test_what_they_compile_to(arguments, assemblies, fits):
    found = assemblies("compile_spectral_norm.py", *arguments)
    fits(found)
    kernels = {row["kernel"] for row in found}
    assert kernels == {
        "spectral_norm_product",
        "spectral_norm_write",
        "spectral_norm_inner_product",
        "spectral_norm_gradient",
    }
