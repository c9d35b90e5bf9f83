"""Mean differences: the kernels against the reference, feature matching and consistency."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern import losses
from genkern.ops.differences import op, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
COUNTS = [1, 5, 33, 1000, 33001]

every_distance = pytest.mark.parametrize("distance", ["absolute", "square"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def numbers(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def differences(a, b, distance, weights):
    names = [(f"a[{i}]", f"b[{i}]") for i in range(len(a))]
    return op.differences(names, a, b, distance, weights)


def value_and_gradients(function, inputs, scale=1.0):
    value = function()
    return [value.detach(), *torch.autograd.grad(value * scale, inputs)]


def error(got, exact):
    return (got.double() - exact.double()).abs().max().item()


@pytest.mark.parametrize("scale", [1.0, 3.0])
@every_dtype
@every_distance
def test_exact_at_every_level(distance, dtype, scale, cpu_level, poisoned):
    """Against fp64: at most 1.25 times eager's error in the same dtype, above a floor."""
    a, b = ([numbers(n, dtype=dtype) for n in COUNTS] for _ in range(2))
    weights = [1.0, 0.5, 2.0, 3.0, 1.0]

    def run(a, b, backend):
        with genkern.use_backend(backend), genkern.explain() as log:
            result = value_and_gradients(
                lambda: differences(a, b, distance, weights), [*a, *b], scale
            )
        assert {choice.backend for choice in log} == {backend}
        return result

    got, eager = run(a, b, "cpu"), run(a, b, "reference")
    wide = [[x.detach().double().requires_grad_() for x in side] for side in (a, b)]
    exact = run(*wide, "reference")
    for g, e, x in zip(got, eager, exact, strict=True):
        limit = 1.25 * error(e, x) + FLOOR[g.dtype] * max(x.abs().max().item(), 1e-3)
        assert error(g, x) <= limit, g.shape
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4),
    distance=st.sampled_from(["absolute", "square"]),
    layout=st.sampled_from(["dense", "strided", "transposed", "one transposed"]),
    need=st.sampled_from([(True, True), (False, True), (True, False)]),
)
def test_any_shape(shapes, distance, layout, need):
    def make(shape, which, wanted):
        x = torch.randn(*shape, 2, dtype=torch.float64)
        x = x[..., 0] if layout == "strided" else x[..., 0].clone()
        if layout == "transposed" or (layout == "one transposed" and which):
            x = x.mT.contiguous().mT if x.dim() > 1 else x
        return x.requires_grad_(wanted)

    a, b = ([make(s, i, wanted) for s in shapes] for i, wanted in enumerate(need))
    inputs = [x for x in (*a, *b) if x.requires_grad]
    weights = [0.5 + i for i in range(len(shapes))]
    got = value_and_gradients(lambda: differences(a, b, distance, weights), inputs)
    with genkern.use_backend("reference"):
        expected = value_and_gradients(lambda: differences(a, b, distance, weights), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13, equal_nan=True)


def test_channels_last_is_read_as_it_lies(monkeypatch):
    a, b = (
        numbers(2, 3, 4, 5).detach().contiguous(memory_format=torch.channels_last) for _ in "ab"
    )
    monkeypatch.setattr(torch.Tensor, "contiguous", None)  # a call would raise
    b.requires_grad_()
    (gradient,) = torch.autograd.grad(differences([a], [b], "square", [1.0]), b)
    assert gradient.stride() == b.stride()
    torch.testing.assert_close(gradient, 2 * (b - a).detach() / a.numel())


@every_distance
def test_nan_inf_and_equal_numbers(distance, cpu_level):
    a = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("nan"), -1.0], requires_grad=True)
    b = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 2.0], requires_grad=True)
    with genkern.use_backend("cpu"):
        got = value_and_gradients(lambda: differences([a], [b], distance, [1.0]), [a, b])
    with genkern.use_backend("reference"):
        expected = value_and_gradients(lambda: differences([a], [b], distance, [1.0]), [a, b])
    torch.testing.assert_close(got, expected, equal_nan=True)


@every_distance
def test_the_same_bits_on_any_number_of_threads(distance, cpu_level):
    a, b = ([numbers(n, dtype=torch.float32) for n in (200_001, 7)] for _ in range(2))
    results, before = [], torch.get_num_threads()
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(
            value_and_gradients(lambda: differences(a, b, distance, [1.0, 2.0]), [*a, *b], 0.7)
        )
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@every_distance
def test_gradcheck(distance):
    a, b = [numbers(3), numbers(2, 2)], [numbers(3), numbers(2, 2)]

    def function(*x):
        return differences(x[:2], x[2:], distance, [1.0, 2.0])

    with genkern.use_backend("cpu"):
        assert torch.autograd.gradcheck(function, (*a, *b))
        assert torch.autograd.gradgradcheck(function, (*a, *b))


def test_second_derivative_says_where_it_ran():
    a, b = numbers(5), numbers(5)
    with genkern.explain() as log:
        loss = differences([a], [b], "square", [1.0])
        torch.autograd.grad(loss, a, create_graph=True)
    assert [(c.op, c.backend) for c in log] == [(op.OP, "cpu"), (op.BACKWARD, "reference")]


def test_backward_twice():
    """The forward's own gradients are given away once; a second backward computes anew."""
    a, b = numbers(50, dtype=torch.float32), numbers(50, dtype=torch.float32)
    loss = differences([a], [b], "square", [1.0])
    first = torch.autograd.grad(loss * 2, [a, b], retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    torch.testing.assert_close(kept, list(torch.autograd.grad(loss * 2, [a, b])))


def test_loss_scale_comes_before_rounding():
    """1e6 fp16 numbers have gradients near 1e-6: rounded first, many would be lost to a scale."""
    a = numbers(1_000_000, dtype=torch.float16)
    b = torch.zeros_like(a)
    (got,) = torch.autograd.grad(differences([a], [b], "absolute", [1.0]) * 65536.0, a)
    torch.testing.assert_close(
        got.double(), a.detach().double().sign() * 0.065536, rtol=1e-3, atol=0
    )


# ---- torch.library ------------------------------------------------------------------------------


def test_opcheck():
    a, b = [numbers(3), numbers(2, 2)], [numbers(3), numbers(2, 2)]
    arguments = (a, b, "absolute", [1.0, 0.5], True, True)
    torch.library.opcheck(torch.ops.genkern.differences.default, arguments)
    detached = [[x.detach() for x in side] for side in (a, b)]
    torch.library.opcheck(
        torch.ops.genkern.differences_backward.default,
        (torch.tensor(2.0, dtype=torch.float64), *detached, "absolute", [1.0, 0.5], False, True),
    )


@pytest.mark.parametrize("detach", [True, False])
def test_compiled(detach):
    real = [[numbers(2, 3, 4), numbers(2, 1)], [numbers(2, 5)]]
    fake = [[numbers(2, 3, 4), numbers(2, 1)], [numbers(2, 5)]]
    inputs = [x for maps in (fake if detach else real + fake) for x in maps]

    def run(real, fake):
        return losses.feature_matching(real, fake, detach_real=detach)

    eager = value_and_gradients(lambda: run(real, fake), inputs, 2.0)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True)
    with genkern.explain() as log:
        got = value_and_gradients(lambda: compiled(real, fake), inputs, 2.0)
    assert [c.op for c in log] == [op.OP, op.BACKWARD] and {c.backend for c in log} == {"cpu"}
    torch.testing.assert_close(got, eager)


def test_forward_mode_is_refused_not_zero():
    a, b = numbers(5).detach(), numbers(5).detach()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: losses.cr(x, b), (a,), (a,))


def test_reference_differentiates_any_number_of_times():
    a, b = numbers(3), numbers(3)
    assert torch.autograd.gradgradcheck(
        lambda a, b: reference.differences([a], [b], "square", [0.3]), (a, b)
    )


# ---- Feature matching ---------------------------------------------------------------------------


def maps():
    shapes = [[(2, 4, 7), (2, 1, 3)], [(2, 3, 5, 2), (2, 8), (1,)]]
    return [[[numbers(*s) for s in layers] for layers in shapes] for _ in range(2)]


def test_hifi_gan():
    """As its code writes it: 2 Σ Σ mean |·|, one call and one kernel for all."""
    real, fake = maps()
    flat = [x for layers in fake for x in layers]
    with genkern.explain() as log:
        got = value_and_gradients(lambda: losses.feature_matching(real, fake), flat)
    assert [(c.op, c.backend) for c in log] == [(op.OP, "cpu"), (op.BACKWARD, "cpu")]
    pairs = zip([x for layers in real for x in layers], flat, strict=True)
    terms = [F.l1_loss(f, r) for r, f in pairs]
    expected = value_and_gradients(lambda: 2 * sum(terms), flat)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


def test_pix2pix_hd():
    """λ · Σ_D 1/num_D · Σ_layers 4/(layers + 1) · L1, over layers + 1 maps."""
    real, fake = maps()
    expected = sum(
        10.0 / len(fake) * 4.0 / len(fs) * F.l1_loss(f, r.detach())
        for rs, fs in zip(real, fake, strict=True)
        for r, f in zip(rs, fs, strict=True)
    )
    got = losses.feature_matching(real, fake, factor=40.0, reduction="mean", layer_reduction="mean")
    torch.testing.assert_close(got, expected)


def test_one_discriminator_and_squares():
    real, fake = (side[1] for side in maps())
    got = losses.feature_matching(real, fake, factor=1.0, distance="square", detach_real=False)
    expected = sum(F.mse_loss(f, r) for r, f in zip(real, fake, strict=True))
    torch.testing.assert_close(got, expected)
    grads = torch.autograd.grad(got, real), torch.autograd.grad(expected, real)
    torch.testing.assert_close(*grads)


def test_real_maps_are_a_constant():
    real, fake = maps()
    losses.feature_matching(real, fake).backward()
    assert all(x.grad is None for layers in real for x in layers)
    assert all(x.grad is not None for layers in fake for x in layers)


@pytest.mark.parametrize(
    ("real", "fake", "options", "exception", "sentence"),
    [
        (
            torch.ones(2),
            [[torch.ones(2)]],
            {},
            TypeError,
            "real must be a list of lists of feature",
        ),
        ([], [[torch.ones(2)]], {}, TypeError, "real must be .* not an empty list"),
        (
            [[torch.ones(2)]],
            [[torch.ones(2)]] * 2,
            {},
            ValueError,
            "as many discriminators, not of 1",
        ),
        ([[torch.ones(2)]], [[torch.ones(2)] * 2], {}, ValueError, r"real\[0\] and fake\[0\] must"),
        (
            [[torch.ones(2)]],
            [[torch.ones(3)]],
            {},
            ValueError,
            r"real\[0\]\[0\] and fake\[0\]\[0\] must have one shape, not \(2,\) and \(3,\)",
        ),
        ([[1.0]], [[torch.ones(3)]], {}, TypeError, r"real\[0\]\[0\] must be a tensor, not float"),
        (
            [[torch.ones(2)]],
            [[torch.ones(2)]],
            {"distance": "l1"},
            ValueError,
            'distance must be "absolute" or "square", not \'l1\'',
        ),
        (
            [[torch.ones(2)]],
            [[torch.ones(2)]],
            {"layer_reduction": "none"},
            ValueError,
            'layer_reduction must be "sum" or "mean"',
        ),
    ],
)
def test_bad_arguments(real, fake, options, exception, sentence):
    with pytest.raises(exception, match=sentence):
        losses.feature_matching(real, fake, **options)


# ---- Consistency --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_consistency(backend):
    a, b, c, d = (numbers(6, 1) for _ in range(4))
    squares = F.mse_loss
    with genkern.use_backend(backend), genkern.explain() as log:
        for got, expected in (
            (losses.cr(a, b), 10 * squares(a, b)),
            (losses.cr(a, b, weight=2.0), 2 * squares(a, b)),
            (losses.bcr(a, b, c, d), 10 * squares(a, b) + 10 * squares(c, d)),
            (
                losses.bcr(a, b, c, d, real_weight=1.0, fake_weight=3.0),
                squares(a, b) + 3 * squares(c, d),
            ),
            (losses.zcr.d(a, b), 20 * squares(a, b)),
            (losses.zcr.g(a, b), -0.5 * squares(a, b)),
            (losses.cr([a, c], [b, d]), 10 * squares(a, b) + 10 * squares(c, d)),
        ):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)
            torch.testing.assert_close(
                torch.autograd.grad(got, [a, b]), torch.autograd.grad(expected, [a, b])
            )
    assert {choice.backend for choice in log} == {backend}


def test_consistency_names_its_arguments():
    with pytest.raises(ValueError, match="fake and augmented_fake must have one shape"):
        losses.bcr(torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="logits and augmented must hold as many"):
        losses.cr([torch.ones(2)], [])
