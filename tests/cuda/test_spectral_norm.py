"""Spectral normalization in CUDA: the kernels' PTX, executed, against the reference in fp64."""

import contextlib
import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import genkern
from genkern import ptx
from genkern.ops.spectral_norm import cuda, op, reference
from genkern.ptx import shipped

FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HAS_GPU = torch.cuda.is_available()  # then they run there
DEVICE = "cuda" if HAS_GPU else "cpu"
no_gpu = pytest.mark.skipif(HAS_GPU, reason="for the executor")
every_order = pytest.mark.parametrize("order", reference.ORDERS)
every_dtype = pytest.mark.parametrize("dtype", FLOOR, ids=lambda d: str(d).removeprefix("torch."))

# (shape, dim): one element, row, column; rows outermost, between, innermost, of whole packs of 16
# bytes and not; nothing at all.
TINY = [((1, 1), 0), ((5, 3), 0), ((6, 5), 1), ((7, 5, 3), 1), ((9, 4, 3), 2), ((33, 1), 0)]
PACKED = [((40, 48), 0), ((3, 9, 4, 4), 1), ((35, 16), 1), ((8, 24), 0)]
EMPTY = [((0, 5), 0), ((5, 0), 0), ((0, 3, 2), 1), ((3, 0, 2), 1)]


def split(dtype):
    """Weights whose sums are split among blocks: over columns and over rows, of each kind."""
    tiles = 8 * 32 * 16 // dtype.itemsize  # the least that is split, along memory
    packed = [((33, tiles), 0), ((256, 72), 0), ((2, 272, 4, 4), 1), ((260, 40), 1)]
    return [*packed, ((3, tiles + 37), 0), ((300, 7), 0), ((tiles // 3, 5, 3, 1), 1), ((290, 5), 1)]


def guarded(x, offset=8):
    """The same in the same strides, in the midst of NaN, `offset` elements into its memory."""
    memory = torch.full((x.numel() + 2 * offset,), math.nan, dtype=x.dtype, device=DEVICE)
    return memory.as_strided(x.shape, torch.empty_like(x).stride(), offset).copy_(x)


def network(shapes, dtype=torch.float64, offset=8, vectors_dtype=None):
    """(weights, us, vs, dims): weights away from zero mean; a v that an iteration, and noise, made
    of a random one, and the u that fits it: σ then has all digits."""
    weights, us, vs, dims = [], [], [], []
    for shape, dim in shapes:
        weight = torch.randn(shape, dtype=torch.float64) + 0.3
        matrix = reference.as_matrix(weight, dim)
        v = torch.randn(math.prod(shape[:dim]) * math.prod(shape[dim + 1 :])).double()
        if weight.numel():
            v = F.normalize(matrix.T @ (matrix @ v), dim=0) + 0.3 * F.normalize(v, dim=0)
        v = F.normalize(v, dim=0)
        u = F.normalize(matrix @ v, dim=0) if weight.numel() else v.new_zeros(shape[dim])
        weights.append(guarded(weight.to(dtype), offset).requires_grad_())
        us.append(guarded(u.to(vectors_dtype or dtype), offset))
        vs.append(guarded(v.to(vectors_dtype or dtype), offset))
        dims.append(dim)
    return weights, us, vs, dims


def cotangents_of(weights):
    of_weights = [torch.randn(w.shape).double().to(DEVICE) for w in weights]
    return of_weights, torch.randn(len(weights)).double().to(DEVICE)


def run(weights, us, vs, dims, cotangents=None, backend="cuda", executor=None, **options):
    """([Ŵ of all, u of all, v of all, σ], gradients) by the backend that was asked for. executor:
    arguments of `ptx.executing`."""
    executing = contextlib.nullcontext() if HAS_GPU else ptx.executing(**(executor or {}))
    with executing, genkern.use_backend(backend), genkern.explain() as log:
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


def assert_exact(arguments, cotangents, executor=None, **options):
    """At most 1.25 times the error of eager PyTorch in the same dtype, above the dtype's floor."""
    dtype = arguments[0][0].dtype
    got, grads = run(*arguments, cotangents, executor=executor, **options)
    eager, eager_grads = run(*arguments, cotangents, backend="reference", **options)
    exact, exact_grads = exactly(*arguments, cotangents, **options)
    # The terms of a gradient cancel, to nothing where W is 1×1.
    of_weights, of_sigmas = cotangents
    terms = [
        (largest(g) / s.abs() + t.abs()).item()
        for g, s, t in zip(of_weights, exact[-1], of_sigmas, strict=True)
    ]
    scales = [largest(x) for x in exact] + terms
    for g, e, x, scale in zip(
        got + grads, eager + eager_grads, exact + exact_grads, scales, strict=True
    ):
        assert g.shape == x.shape
        of_eager, error = largest(e.double() - x), largest(g.double() - x)
        # Of nothing there is nothing to compare: σ is 0 then, and its scale NaN.
        allowed = 1.25 * of_eager + (FLOOR[dtype] * scale if x.numel() else 0.0)
        assert error <= allowed, (x.shape, error, of_eager)


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


# ---- Meaning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "order", "schedule", "offset"),
    [
        (torch.float32, "u_first", "reversed", 8),
        (torch.float32, "v_first", 1, 3),
        (torch.float64, "u_first", "sequential", 8),
        (torch.bfloat16, "v_first", 2, 8),
        (torch.float16, "u_first", 3, 8),
    ],
)
def test_exact(dtype, order, schedule, offset, poisoned):
    """0, 1 and 3 iterations in one list; memory at multiples of 16 bytes and not."""
    shapes = TINY + PACKED + EMPTY + split(dtype)
    arguments = network(shapes, dtype, offset)
    iterations = [(0, 1, 3)[i % 3] for i in range(len(shapes))]
    cotangents = cotangents_of(arguments[0])
    options = {"n_power_iterations": iterations, "order": order, "executor": {"schedule": schedule}}
    assert_exact(arguments, cotangents, **options)


@pytest.mark.exhaustive
@every_dtype
@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("offset", [3, 8])
@every_order
def test_exact_on_the_whole_grid(dtype, order, n, offset, poisoned):
    large = [((1, 9000), 0), ((3000, 10), 0), ((128, 128, 3, 3), 0), ((64, 96, 4, 4), 1)]
    shapes = [*TINY, *PACKED, *EMPTY, *split(dtype), *large, ((2, 3, 4, 5), 2)]
    arguments = network(shapes, dtype, offset)
    cotangents = cotangents_of(arguments[0])
    assert_exact(arguments, cotangents, n_power_iterations=n, order=order, executor={"schedule": n})


def test_a_very_large_weight(poisoned):
    """Blocks with several loops, as only such weights have them; nothing is left for the last
    loops of some."""
    arguments = network([((1031, 1031), 0), ((5, 3), 0)])
    assert_exact(arguments, cotangents_of(arguments[0]))


def test_a_layer_is_what_it_is_alone():
    """In any order of blocks and threads, the same bits."""
    shapes = TINY[:3] + split(torch.float32)[:1]
    weights, us, vs, dims = network(shapes, torch.float32)
    iterations, count = [0, 1, 3, 1], 4
    together, _ = run(
        weights, us, vs, dims, n_power_iterations=iterations, executor={"schedule": 5}
    )
    for i, n in enumerate(iterations):
        alone, _ = run([weights[i]], [us[i]], [vs[i]], [dims[i]], n_power_iterations=n)
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


@no_gpu
@pytest.mark.parametrize("copies", [1, 40])
@pytest.mark.parametrize(("iterations", "count"), [(0, 2), (1, 3), (3, 7)])
def test_launches(iterations, count, copies):
    """As many as the iterations need, whatever the number of layers."""
    weights, us, vs, dims = network((TINY + EMPTY) * copies)
    n = [iterations if i % 2 == 0 else 0 for i in range(len(weights))]
    with genkern.use_backend("cuda"), ptx.recording() as launches:
        result = op.spectral_norm(weights, us, vs, dims, n_power_iterations=n)
        assert len(launches) == count
        outputs = [*result.weights, result.sigma]
        torch.autograd.grad(outputs, weights, [torch.ones_like(x) for x in outputs])
    assert len(launches) == count + 2


@no_gpu
def test_large_layers_are_split_over_blocks():
    weights, us, vs, dims = network([((256, 2304), 0)], torch.float32)
    with genkern.use_backend("cuda"), ptx.recording() as launches:
        op.spectral_norm(weights, us, vs, dims)
    assert min(launch.grid[0] for launch in launches) >= 32


def test_more_rows_than_the_kernels_count():
    like = torch.empty(0)
    with pytest.raises(ValueError, match=r"less than 1073741824 rows and columns, .* 5 columns"):
        cuda.forward([(0, 1, 2**31, 5, 1, 1, 1, *[0] * 8)], like, "u_first", 0.0)
    with pytest.raises(ValueError, match="and 4294967296 columns"):
        cuda.backward([(0, 0, 2**16, 1, 2**16, 1, *[0] * 5)], like)


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
    weights, us, vs, dims = network([((12, 6, 3, 4), 0), ((6, 7, 4, 4), 1)])
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
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.lists(st.integers(0, 40), min_size=2, max_size=4),
    dim=st.integers(0, 3),
    dtype=st.sampled_from(list(FLOOR)),
    order=st.sampled_from(reference.ORDERS),
    n=st.integers(0, 2),
    permutation=st.permutations(range(4)),
    offset=st.integers(0, 16),
    schedule=st.one_of(st.just("reversed"), st.integers(0, 99)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_in_any_memory(
    shape, dim, dtype, order, n, permutation, offset, schedule, seed, poisoned
):
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
    options = {"n_power_iterations": n, "order": order, "executor": {"schedule": schedule}}
    assert_exact((weights, us, vs, dims), cotangents, **options)


@pytest.mark.parametrize(
    ("dtype", "vectors", "order"),
    [
        (torch.float32, torch.float32, "v_first"),
        (torch.float64, torch.float64, "u_first"),
        (torch.bfloat16, torch.bfloat16, "u_first"),
        (torch.float16, torch.float32, "v_first"),
    ],
)
def test_update(dtype, vectors, order, poisoned):
    """The new vectors also go where the old ones were, in their dtype, and autograd is told."""
    shapes = [TINY[1], TINY[3], split(dtype)[1], TINY[2], EMPTY[0]]
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


# ---- Autograd -----------------------------------------------------------------------------------

SMALL = [((3, 2), 0), ((2, 2, 2), 1)]


def test_missing_cotangents(on_cuda):
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
    (both,) = torch.autograd.grad(result.sigma.sum() + result.weights[2].sum(), third, **options)
    torch.testing.assert_close(both, grads[1] + torch.outer(us[2], vs[2]))
    assert [c.backend for c in on_cuda] == ["cuda"] * 4


def test_backward_after_the_weights_have_changed(on_cuda):
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


def test_second_derivatives(on_cuda):
    """They are the reference's, of what the kernels gave."""
    weights, us, vs, dims = network(SMALL)

    def call(*weights):
        result = op.spectral_norm(weights, us, vs, dims, n_power_iterations=0)
        return *result.weights, result.sigma

    assert torch.autograd.gradgradcheck(call, weights, fast_mode=True)
    assert {c.backend for c in on_cuda if c.op == "spectral_norm"} == {"cuda"}


def test_a_normalised_model(on_cuda):
    """`genkern.spectral_norm`: training steps, then eval, which leaves the vectors alone."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ConvTranspose2d(6, 9, 3), nn.Flatten(), nn.Linear(225, 80)
    )
    with genkern.use_backend("reference"):  # the iterations of the beginning
        model = genkern.spectral_norm(model.double().to(DEVICE), recurse=True)
        other = copy.deepcopy(model)
    on_cuda.clear()

    image = torch.ones(1, 2, 5, 5).double().to(DEVICE)

    def steps(model):
        found = []
        for _ in range(2):
            model(image).square().sum().backward()
            found += [p.grad.clone() for p in model.parameters()]
        model.eval()
        buffers = [b.clone() for b in model.buffers()]
        found.append(model(image))
        assert all(torch.equal(b, old) for b, old in zip(model.buffers(), buffers, strict=True))
        return found + buffers

    got = steps(model)
    assert [(c.op, c.backend) for c in on_cuda] == [
        ("spectral_norm", "cuda"),
        ("spectral_norm.backward", "cuda"),
    ] * 2 + [("spectral_norm", "cuda")]
    with genkern.use_backend("reference"):
        expected = steps(other)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


# ---- Broken kernels -----------------------------------------------------------------------------


def broken(name, pattern, replacement, number):
    """What `ptx.executing` is given to run the fp32 kernel of that name with one place of its PTX
    changed, and the numbers of the places that could be."""
    kernel = next(k for k in shipped.kernels() if f"{name}IfE" in k)
    text = shipped.text_of(kernel)
    start = text.index(f".entry {kernel}")
    end = text.index("\n}", start)
    places = list(re.compile(pattern).finditer(text, start, end))
    if number >= len(places):
        pytest.skip("the kernel has no such place")
    at = places[number]
    module = ptx.Module(text[: at.start()] + at.expand(replacement) + text[at.end() :])
    return lambda wanted: module if wanted == kernel else shipped.module_of(wanted)


every = [*range(8)]
breakages = [
    ("spectral_norm_product", r"bar\.sync[^;]*;", "", every),
    ("spectral_norm_product", r"(membar\.gl|fence\.\S+);", "", [0]),
    ("spectral_norm_product", r"(atom\S*\.add\.u32\s[^;]*), 1;", r"\1, 2;", [0]),
    ("spectral_norm_product", r"(shfl\S*\s[^;]*), 16, ", r"\1, 8, ", every),
    (
        "spectral_norm_product",
        r"fma\.rn\.f32 (\S+), (\S+), (\S+), (\S+);",
        r"mul.rn.f32 \1, \2, \3;",
        every,
    ),
    ("spectral_norm_write", r"div\.rn\.f32 (\S+), (\S+), (\S+);", r"mul.rn.f32 \1, \2, \3;", every),
    ("spectral_norm_inner_product", r"bar\.sync[^;]*;", "", [0]),
    ("spectral_norm_inner_product", r"add\.f64 (\S+), (\S+), (\S+);", r"mov.f64 \1, \2;", every),
    (
        "spectral_norm_gradient",
        r"fma\.rn\.f32 (\S+), (\S+), (\S+), (\S+);",
        r"mul.rn.f32 \1, \2, \3;",
        every,
    ),
]


@no_gpu
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "number"),
    [(*breakage[:3], number) for breakage in breakages for number in breakage[3]],
)
def test_a_broken_kernel_is_seen(name, pattern, replacement, number, poisoned):
    module_of = broken(name, pattern, replacement, number)
    shapes = TINY + PACKED + split(torch.float32)
    arguments = network(shapes, torch.float32)
    cotangents = cotangents_of(arguments[0])
    n = [(1, 0, 2)[i % 3] for i in range(len(shapes))]
    with pytest.raises((ptx.ExecutionError, AssertionError)):
        assert_exact(arguments, cotangents, n_power_iterations=n, executor={"module_of": module_of})
