"""Spectral normalization of a list: the kernels against the reference in fp64."""

import math
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern.ops.spectral_norm import launch, op, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# (shape, dim): rows below, at and above a tile and a vector; one row, one column; a dimension in
# the middle and the last.
SMALL = [
    ((1, 1), 0),
    ((5, 3), 0),
    ((128, 3, 3, 3), 0),
    ((1, 130), 0),
    ((33, 1), 0),
    ((6, 5), 1),
    ((64, 20, 4, 4), 1),
    ((7, 5, 3), 1),
    ((9, 4, 3), 2),
    ((2, 3, 4, 5), 2),
]
EMPTY = [((0, 5), 0), ((5, 0), 0), ((0, 3, 2), 1), ((3, 0, 2), 1)]


def cut(dtype):
    """Weights just over 800 KB, which the kernels cut into several tasks."""
    count = 200_000 * 4 // dtype.itemsize
    return [((count // 601, 601), 0), ((601, count // 601), 1), ((count // 1750, 70, 5, 5), 1)]


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_order = pytest.mark.parametrize("order", reference.ORDERS)


def layers(shapes, dtype=torch.float64):
    """(weights, us, vs, dims): random weights away from zero mean; a random unit v and the u that
    fits it, so that σ of the stored vectors keeps its digits."""
    weights, us, vs, dims = [], [], [], []
    for shape, dim in shapes:
        weight = torch.randn(shape, dtype=torch.float64) + 0.3
        v = F.normalize(torch.randn(columns(shape, dim), dtype=torch.float64), dim=0)
        u = (
            F.normalize(reference.as_matrix(weight, dim) @ v, dim=0)
            if weight.numel()
            else v.new_zeros(shape[dim])
        )
        weights.append(weight.to(dtype).requires_grad_())
        us.append(u.to(dtype))
        vs.append(v.to(dtype))
        dims.append(dim)
    return weights, us, vs, dims


def columns(shape, dim):
    return math.prod(shape[:dim]) * math.prod(shape[dim + 1 :])


def results(call, us, vs):
    """Every output as one flat list: Ŵ of all, u and v of all, σ."""
    new_us, new_vs = op.split_state(call.state, us, vs)
    return [*call.weights, *new_us, *new_vs, call.sigma]


def run(weights, us, vs, dims, cotangents=None, backend="cpu", **options):
    """Outputs and, for cotangents of Ŵ and σ, gradients, on the backend that was asked for."""
    with genkern.use_backend(backend), genkern.explain() as log:
        call = op.spectral_norm(weights, us, vs, dims, **options)
        outputs = results(call, us, vs)
        grads = []
        if cotangents is not None:
            of_weights, of_sigma = cotangents
            of_weights = [g.to(w.dtype) for g, w in zip(of_weights, weights, strict=True)]
            grads = torch.autograd.grad(
                [*call.weights, call.sigma], weights, [*of_weights, of_sigma.to(call.sigma.dtype)]
            )
    assert [choice.backend for choice in log] == [backend] * (2 if grads else 1), log
    return [x.detach() for x in outputs], list(grads)


def natively(weights, us, vs, dims, cotangents, n_power_iterations=1, order="u_first", eps=1e-12):
    """The same from the reference and autograd alone, in fp64."""
    wide = [w.detach().double().requires_grad_() for w in weights]
    normalized, sigma, new_us, new_vs = reference.spectral_norm(
        wide,
        [u.double() for u in us],
        [v.double() for v in vs],
        dims,
        [n_power_iterations] * len(wide),
        eps,
        order,
    )
    of_weights, of_sigma = cotangents
    grads = torch.autograd.grad([*normalized, sigma], wide, [*of_weights, of_sigma])
    return [x.detach() for x in [*normalized, *new_us, *new_vs, sigma]], list(grads)


def cotangents_of(weights):
    of_weights = [torch.randn(w.shape, dtype=torch.float64) for w in weights]
    return of_weights, torch.randn(len(weights), dtype=torch.float64)


def gradient_scales(exact, cotangents):
    """How large the terms of each gradient are: they cancel, to nothing where W is 1×1."""
    of_weights, of_sigma = cotangents
    return [
        ((g.abs().max() if g.numel() else 0) / s.abs() + t.abs()).item()
        for g, s, t in zip(of_weights, exact[-1], of_sigma, strict=True)
    ]


def assert_exact(got, eager, exact, dtype, scales=None):
    """At most 1.25 times eager's error in the same dtype, above the dtype's floor."""
    for i, (g, e, x) in enumerate(zip(got, eager, exact, strict=True)):
        if x.numel() == 0:
            assert g.shape == x.shape
            continue
        scale = scales[i] if scales else x.abs().max().item()
        of_eager = (e.double() - x).abs().max().item()
        error = (g.double() - x).abs().max().item()
        assert error <= 1.25 * of_eager + FLOOR[dtype] * scale, (i, tuple(x.shape), error, of_eager)


# ---- Meaning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n",
    [
        0,
        pytest.param(1, marks=pytest.mark.exhaustive),
        2,
        pytest.param(3, marks=pytest.mark.exhaustive),
    ],
)
@every_order
@every_dtype
def test_exact_at_every_level(dtype, order, n, cpu_level, poisoned):
    arguments, cotangents, eager, exact = expected(dtype, order, n)
    got, grads = run(*arguments, cotangents, n_power_iterations=n, order=order)
    assert_exact(got, eager[0], exact[0], dtype)
    assert_exact(grads, eager[1], exact[1], dtype, gradient_scales(exact[0], cotangents))
    assert {g.dtype for g in grads} == {dtype}
    assert got[-1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@lru_cache
def expected(dtype, order, n):
    """Arguments and cotangents, and (outputs, gradients) by eager in `dtype` and in fp64."""
    arguments = layers(SMALL + EMPTY + cut(dtype), dtype)
    cotangents = cotangents_of(arguments[0])
    options = {"n_power_iterations": n, "order": order}
    eager = run(*arguments, cotangents, backend="reference", **options)
    return arguments, cotangents, eager, natively(*arguments, cotangents, **options)


def test_sigma_is_the_largest_singular_value():
    """Independent of the reference: many iterations find what the SVD finds."""
    weights, us, vs, dims = layers([((40, 3, 3, 3), 0), ((12, 30, 2), 1)])
    got, _ = run(weights, us, vs, dims, n_power_iterations=2000)
    for weight, dim, sigma in zip(weights, dims, got[-1], strict=True):
        top = torch.linalg.matrix_norm(reference.as_matrix(weight, dim), 2)
        torch.testing.assert_close(sigma, top.detach(), rtol=1e-9, atol=0)


@every_order
def test_iterations_of_each_weight(order, cpu_level):
    """One number a weight, 0 among them: as each alone."""
    weights, us, vs, dims = layers(SMALL + cut(torch.float64))
    iterations = [i % 4 for i in range(len(weights))]
    together, _ = run(weights, us, vs, dims, n_power_iterations=iterations, order=order)
    count = len(weights)
    for i, n in enumerate(iterations):
        alone, _ = run([weights[i]], [us[i]], [vs[i]], [dims[i]], n_power_iterations=n, order=order)
        assert torch.equal(together[i], alone[0])
        assert torch.equal(together[count + i], alone[1])
        assert torch.equal(together[2 * count + i], alone[2])


def test_the_same_bits_on_any_number_of_threads(cpu_level):
    weights, us, vs, dims = layers(SMALL + cut(torch.float32), torch.float32)
    cotangents = cotangents_of(weights)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outputs, grads = run(weights, us, vs, dims, cotangents, n_power_iterations=2)
        runs.append(outputs + grads)
    torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e-13, 1e12, 1e17, float("nan"), float("inf")])
@pytest.mark.parametrize("n", [0, 1, 2])
@every_order
def test_clamped_and_extreme_weights(order, n, scale, cpu_level):
    """Where eps clamps, where squares would leave fp32's range, and where torch gives NaN: fp32
    gives what fp64 gives."""
    shapes = [((6, 5), 0), ((3, 4, 5), 1), ((333, 601), 0), ((5, 6), 1)]
    weights, us, vs, dims = layers(shapes, torch.float32)
    with torch.no_grad():
        for weight in weights:
            if 0 <= scale < float("inf"):
                weight.mul_(scale)
            else:
                weight[0].fill_(scale)
    options = {"n_power_iterations": n, "order": order}
    got, _ = run(weights, us, vs, dims, **options)
    wide = [[x.detach().double() for x in xs] for xs in (weights, us, vs)]
    exact, _ = run(*wide, dims, backend="reference", **options)
    for g, x in zip(got, exact, strict=True):
        finite = x[x.isfinite()].abs()
        atol = 1e-5 * finite.max().item() if len(finite) else 0.0
        torch.testing.assert_close(g.double(), x, rtol=1e-4, atol=atol, equal_nan=True)


@pytest.mark.parametrize("eps", [1e-3, 0.5, 30.0, 1e4])
@every_order
def test_large_eps(order, eps, cpu_level):
    """eps at the size of the norms: clamps one of the two, or both, or none."""
    weights, us, vs, dims = layers(SMALL + cut(torch.float64))
    cotangents = cotangents_of(weights)
    options = {"n_power_iterations": 2, "order": order, "eps": eps}
    got, grads = run(weights, us, vs, dims, cotangents, **options)
    exact, exact_grads = natively(weights, us, vs, dims, cotangents, **options)
    assert_exact(got, exact, exact, torch.float64)
    scales = gradient_scales(exact, cotangents)
    assert_exact(grads, exact_grads, exact_grads, torch.float64, scales)


def test_rank_one():
    """One iteration finds σ = ‖a‖·‖b‖ of a bᵀ."""
    a, b = torch.randn(7).double(), torch.randn(11).double()
    _, us, vs, dims = layers([((7, 11), 0)])
    got, _ = run([torch.outer(a, b)], us, vs, dims)
    torch.testing.assert_close(got[-1], (a.norm() * b.norm())[None], rtol=1e-12, atol=0)


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
    if how == "misaligned":
        return torch.cat([weight.new_zeros(1), weight.reshape(-1)])[1:].view(weight.shape)
    return torch._neg_view(-weight)


@pytest.mark.parametrize(
    "how", ["channels_last", "transposed", "swapped", "sliced", "misaligned", "negated"]
)
def test_strides(how, poisoned):
    weights, us, vs, dims = layers([((12, 5, 3, 4), 0), ((6, 7, 4, 4), 1)])
    cotangents = cotangents_of(weights)
    expected, expected_grads = run(weights, us, vs, dims, cotangents)
    other = [strided(w.detach(), how).requires_grad_() for w in weights]
    us, vs = ([torch.stack([x, x], 1)[:, 0] for x in xs] for xs in (us, vs))
    cotangents = [strided(g, how) for g in cotangents[0]], cotangents[1]
    got, grads = run(other, us, vs, dims, cotangents)
    for g, e in zip(got + grads, expected + expected_grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)
    for result, weight in zip(got, other, strict=False):
        assert result.stride() == torch.empty_like(weight).stride()


@every_dtype
@pytest.mark.parametrize("update", [False, True])
def test_dense_memory_is_read_as_it_lies(dtype, update, poisoned, monkeypatch, cpu_level):
    """channels_last of images and volumes, Linear's transposed: no copy of a weight or gradient,
    small ones, some that are cut, and one whose vectors need another order."""
    shapes = [((12, 5, 3, 4), 0), ((6, 7, 4, 4), 1), ((300, 64, 4, 4), 0), ((80, 70, 6, 6), 1)]
    arguments = layers([*shapes, ((5, 3, 2, 3, 2), 0), ((30, 20), 0), ((700, 400), 0)], dtype)
    weights, us, vs, dims = arguments
    formats = [torch.channels_last] * 4 + [torch.channels_last_3d]
    of_weights, of_sigma = cotangents_of(weights)

    def relaid(tensors):
        images = [x.contiguous(memory_format=f) for x, f in zip(tensors, formats, strict=False)]
        return [*images, *[x.t().contiguous().t() for x in tensors[5:]]]

    other = [w.detach().requires_grad_() for w in relaid(weights)]
    cotangents = relaid(of_weights), of_sigma
    exact, exact_grads = natively(*arguments, cotangents)
    eager, eager_grads = run(*arguments, cotangents, backend="reference")
    monkeypatch.setattr(launch, "_contiguous", lambda *_: pytest.fail("a copy"))
    monkeypatch.setattr(launch, "_laid_out_as", lambda weight, grad: untouched(grad, weight))
    monkeypatch.setattr(launch, "_restore", untouched)
    got, grads = run(other, us, vs, dims, cotangents, update=update)
    assert_exact(got, eager, exact, dtype)
    assert_exact(grads, eager_grads, exact_grads, dtype, gradient_scales(exact, cotangents))
    for result, gradient, weight in zip(got, grads, other, strict=False):
        assert result.stride() == weight.stride() == gradient.stride()
    if update:
        count = len(us)
        for x, e in zip([*us, *vs], got[count : 3 * count], strict=True):
            assert torch.equal(x, e.to(dtype))


def untouched(result, like):
    assert result.stride() == like.stride(), "a copy"
    return result


def test_a_whole_network_of_strided_vectors_is_updated():
    weights, us, vs, dims = layers([((12, 5, 3), 0), ((6, 7, 4), 1)])
    expected, _ = run(weights, us, vs, dims)
    us, vs = ([torch.stack([x, x], 1)[:, 0] for x in xs] for xs in (us, vs))
    run(weights, us, vs, dims, update=True)
    assert all(torch.equal(x, e) for x, e in zip([*us, *vs], expected[2:6], strict=True))


@every_dtype
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_update_writes_the_vectors_and_tells_autograd(dtype, backend):
    weights, us, vs, dims = layers(SMALL + cut(dtype), dtype)
    versions = [x._version for x in [*us, *vs]]
    expected, _ = run(weights, us, vs, dims, backend=backend)
    assert versions == [x._version for x in [*us, *vs]]
    run(weights, us, vs, dims, backend=backend, update=True)
    for x, e in zip([*us, *vs], expected[len(us) : 3 * len(us)], strict=True):
        assert torch.equal(x, e.to(dtype))
    assert all(x._version > before for x, before in zip([*us, *vs], versions, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_in_full_precision_beside_half_weights(dtype, cpu_level):
    weights, us, vs, dims = layers(SMALL + cut(dtype), dtype)
    us, vs = [u.float() for u in us], [v.float() for v in vs]
    expected, _ = run(weights, us, vs, dims)
    run(weights, us, vs, dims, update=True)
    assert all(torch.equal(x, e) for x, e in zip([*us, *vs], expected[len(us) :], strict=False))


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("wide", ["us", "vs"])
def test_vectors_of_two_dtypes(wide, update, cpu_level):
    """u in full precision and v in half, or the other way round."""
    weights, us, vs, dims = layers(SMALL, torch.float16)
    us, vs = ([x.float() for x in us], vs) if wide == "us" else (us, [x.float() for x in vs])
    expected, _ = run(weights, us, vs, dims, backend="reference")
    got, _ = run(weights, us, vs, dims, update=update)
    for g, e in zip(got[len(us) :], expected[len(us) :], strict=True):
        torch.testing.assert_close(g, e)
    if update:
        for x, e in zip((*us, *vs), got[len(us) : 3 * len(us)], strict=True):
            assert torch.equal(x, e.to(x.dtype))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=2, max_size=4),
    dim=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from(reference.ORDERS),
    n=st.integers(0, 3),
    permutation=st.permutations(range(4)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_in_any_memory(shape, dim, dtype, order, n, permutation, seed):
    torch.manual_seed(seed)
    dim %= len(shape)
    while torch.Size(shape).numel() > 20000:
        shape = [x // 2 for x in shape]
    weights, us, vs, dims = layers([(tuple(shape), dim), ((9, 4), 0)], dtype)
    cotangents = cotangents_of(weights)
    options = {"n_power_iterations": n, "order": order}
    outwards = [i for i in permutation if i < len(shape)]
    back = [outwards.index(i) for i in range(len(shape))]
    with torch.no_grad():
        weights[0].set_(weights[0].permute(outwards).contiguous().permute(back))
    got, grads = run(weights, us, vs, dims, cotangents, **options)
    eager, eager_grads = run(weights, us, vs, dims, cotangents, backend="reference", **options)
    exact, exact_grads = natively(weights, us, vs, dims, cotangents, **options)
    assert_exact(got, eager, exact, dtype)
    assert_exact(grads, eager_grads, exact_grads, dtype, gradient_scales(exact, cotangents))


# ---- Arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"weights": []}, ValueError, "weights must hold at least one"),
        ({"weights": [3.0]}, TypeError, "weights\\[0\\] must be a tensor"),
        ({"weights": [torch.ones(4, 3, dtype=torch.int64)]}, TypeError, "floating-point dtype"),
        ({"weights": [torch.ones(4, dtype=torch.double)]}, ValueError, "2 or more dimensions"),
        ({"us": []}, ValueError, "us must hold one entry a weight, 1, not 0"),
        ({"us": [torch.ones(3, dtype=torch.double)]}, ValueError, "us\\[0\\] must have the shape"),
        ({"us": [torch.ones(4)]}, TypeError, "us\\[0\\] must have its weight's dtype"),
        ({"vs": [None]}, TypeError, "vs\\[0\\] must be a tensor"),
        ({"vs": [torch.ones(4, dtype=torch.double)]}, ValueError, "vs\\[0\\] must have the shape"),
        ({"vs": [torch.ones(3).double().to("meta")]}, ValueError, "vs\\[0\\] must be on"),
        ({"dims": [2]}, IndexError, "dims\\[0\\] must be in"),
        ({"dims": [-1]}, IndexError, "dims\\[0\\] must be in"),
        ({"n_power_iterations": -1}, ValueError, "n_power_iterations\\[0\\] must be 0 or more"),
        ({"n_power_iterations": [1, 1]}, ValueError, "n_power_iterations must hold one"),
        ({"order": "w_first"}, ValueError, "order must be 'u_first' or 'v_first'"),
    ],
)
def test_bad_arguments(change, kind, message):
    weights, us, vs, dims = layers([((4, 3), 0)])
    arguments = {"weights": weights, "us": us, "vs": vs, "dims": dims} | change
    with pytest.raises(kind, match=message):
        op.spectral_norm(**arguments)


def test_mixed_dtypes_are_refused():
    weights, us, vs, dims = layers([((4, 3), 0), ((4, 3), 0)])
    weights[1] = weights[1].float()
    with pytest.raises(TypeError, match="weights\\[1\\] must have weights\\[0\\]'s dtype"):
        op.spectral_norm(weights, us, vs, dims)
