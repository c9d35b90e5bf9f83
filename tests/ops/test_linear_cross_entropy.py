"""Cross-entropy of a linear layer: against F.cross_entropy of F.linear and the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import genkern
from genkern import losses
from genkern.ops.linear_cross_entropy import chunks, op

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "softcap": 3.0},
    {"softcap": 2.0, "z_loss": 0.01, "label_smoothing": 0.2, "bias": True},
    {"bias": True, "reduction": "none", "z_loss": 0.1},
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def problem(tokens, d, classes, dtype=torch.float64, bias=False, ignored=True):
    x, w, b = torch.randn(tokens, d), torch.randn(classes, d) * 0.7, torch.randn(classes)
    target = torch.randint(classes, (tokens,))
    if ignored:
        target[::5] = -100
    tensors = [y.bfloat16().to(dtype).requires_grad_() for y in (x, w, b)]
    return tensors if bias else [*tensors[:2], None], target


def ours(tensors, target, **options):
    x, w, b = tensors
    options = {k: v for k, v in options.items() if k != "bias"}
    return losses.linear_cross_entropy(x, w, target, linear_bias=b, **options)


def with_gradients(function, tensors, upstream=3.0):
    loss = function(tensors)
    slope = torch.linspace(0.5, upstream, max(1, loss.numel()), dtype=loss.dtype)
    slope = slope.view(loss.shape) if loss.numel() else torch.zeros_like(loss)
    present = [y for y in tensors if y is not None]
    return loss, *torch.autograd.grad(loss, present, slope)


def by_hand(tensors, target, *, bias=False, softcap=None, z_loss=0.0, reduction="mean", **options):
    logits = F.linear(*tensors)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, target, reduction=reduction, **options)
    if z_loss:
        penalty = z_loss * torch.log(torch.exp(logits).sum(1)) ** 2
        counted = target != options.get("ignore_index", -100)
        penalty = torch.where(counted, penalty, torch.zeros_like(penalty))
        kinds = {"none": penalty, "sum": penalty.sum(), "mean": penalty.sum() / counted.sum()}
        loss = loss + kinds[reduction]
    return loss


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, the last one ragged, and several parts of the weight's gradient."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", {8: 1, 4: 1, 2: 1})
    monkeypatch.setattr(chunks, "LEAST_TOKENS", 4)
    monkeypatch.setattr(chunks, "WEIGHT_ROWS", 16)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_option
def test_formula(options, backend, small_chunks, poisoned):
    tensors, target = problem(23, 6, 37, bias=options.get("bias", False))
    with genkern.use_backend(backend), genkern.explain() as log:
        got = with_gradients(lambda t: ours(t, target, **options), tensors)
    assert [(c.op, c.backend) for c in log] == [(op.OP, backend), (op.BACKWARD, backend)]
    exact = with_gradients(lambda t: by_hand(t, target, **options), tensors)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@every_dtype
@every_option
def test_exact_at_every_level(options, dtype, cpu_level, small_chunks):
    """Against fp64: at most 1.25 times eager's error in the same dtype, above a floor."""
    for tokens, d, classes in ((1, 1, 1), (6, 3, 5), (9, 16, 70), (40, 8, 1100)):
        tensors, target = problem(tokens, d, classes, dtype, bias=options.get("bias", False))
        target[-1] = 0
        got = with_gradients(lambda t, y=target: ours(t, y, **options), tensors)
        eager = with_gradients(lambda t, y=target: by_hand(t, y, **options), tensors)
        wide = [None if y is None else y.detach().double().requires_grad_() for y in tensors]
        exact = with_gradients(lambda t, y=target: by_hand(t, y, **options), wide)
        for g, e, x in zip(got, eager, exact, strict=True):
            # Root mean squares: the largest single error of so few numbers is luck.
            scale = max(1.0, x.abs().max().item())
            own, other = ((y.double() - x).square().mean().sqrt().item() for y in (g, e))
            assert own <= 1.25 * other + FLOOR[dtype] * scale, (tokens, classes, own, other)
        assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert got[1].dtype == dtype


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    d=st.integers(1, 5),
    classes=st.integers(1, 40),
    options=st.sampled_from(OPTIONS),
    strided=st.booleans(),
)
def test_any_shape(shape, d, classes, options, strided):
    x = torch.randn(*shape, d, 2, dtype=torch.float64)
    w = torch.randn(classes, d, 2, dtype=torch.float64)
    x, w = ((y[..., 0] if strided else y[..., 0].clone()).requires_grad_() for y in (x, w))
    b = torch.randn(classes, dtype=torch.float64, requires_grad=True)
    tensors = [x, w, b if options.get("bias") else None]
    target = torch.randint(-1, classes, tuple(shape))
    options = {**options, "ignore_index": -1}

    def flat(t):
        loss = by_hand([t[0].reshape(-1, d), *t[1:]], target.reshape(-1), **options)
        return loss.reshape(target.shape) if options.get("reduction") == "none" else loss

    got = with_gradients(lambda t: ours(t, target, **options), tensors)
    expected = with_gradients(flat, tensors)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_extreme_logits(cpu_level):
    x = torch.tensor([[1e4], [-1e4], [0.0], [88.0], [-3e4]], requires_grad=True)
    w = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    target = torch.tensor([0, 1, 2, 2, 0])
    got = with_gradients(lambda t: ours(t, target, reduction="none"), [x, w, None])
    expected = with_gradients(lambda t: by_hand(t, target, reduction="none"), [x, w, None])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_as_eager(bad, cpu_level):
    (x, w, _), target = problem(6, 3, 20, torch.float32, ignored=False)
    with torch.no_grad():
        x[2, 1] = bad
    got = ours([x, w, None], target, reduction="none")
    torch.testing.assert_close(
        got, by_hand([x, w, None], target, reduction="none"), equal_nan=True, rtol=1e-5, atol=1e-5
    )


def test_the_kernel_gives_the_same_bits_on_any_number_of_threads(cpu_level):
    """(The GEMMs beside it are torch's, and promise nothing.)"""
    tensors, target = problem(300, 1, 1000, torch.float32)
    results = []
    for count in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        results.append(ours(tensors, target, reduction="none"))
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_one_gradient(wanted):
    (x, w, _), target = problem(9, 4, 12)
    x, w = (y.detach().requires_grad_(want) for y, want in zip((x, w), wanted, strict=True))
    ours([x, w, None], target).backward()
    assert (x.grad is not None, w.grad is not None) == wanted
    both = with_gradients(lambda t: by_hand(t, target), problem_of(x, w), 0.5)
    torch.testing.assert_close(x.grad if wanted[0] else w.grad, both[1 if wanted[0] else 2] / 0.5)


def problem_of(x, w):
    return [x.detach().requires_grad_(), w.detach().requires_grad_(), None]


def test_backward_twice_and_no_gradient():
    tensors, target = problem(9, 4, 12)
    loss = ours(tensors, target)
    first = torch.autograd.grad(loss, tensors[:2], retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss * 2, tensors[:2])
    torch.testing.assert_close([2 * g for g in kept], list(second))
    with torch.no_grad():
        assert not ours(tensors, target).requires_grad


def test_loss_scale_comes_before_rounding():
    """fp16: with so many tokens the gradients of the logits would underflow without the scale."""
    tensors, target = problem(4096, 2, 4, torch.float16, ignored=False)
    got = torch.autograd.grad(ours(tensors, target) * 1024.0, tensors[0])[0]
    wide = [y.detach().double().requires_grad_() for y in tensors[:2]]
    exact = torch.autograd.grad(by_hand([*wide, None], target) * 1024.0, wide[0])[0]
    assert (got.double() - exact).abs().max() <= 4e-3 * exact.abs().max()


@every_option
def test_gradcheck(options):
    tensors, target = problem(4, 3, 5, bias=options.get("bias", False), ignored=False)
    present = [y for y in tensors if y is not None]

    def run(*present):
        return ours([*present, None][:3], target, **options)

    with genkern.use_backend("cpu"):
        assert torch.autograd.gradcheck(run, present)
        assert torch.autograd.gradgradcheck(run, present)


def test_second_derivative_says_where_it_ran():
    tensors, target = problem(4, 3, 5)
    with genkern.explain() as log:
        torch.autograd.grad(ours(tensors, target), tensors[0], create_graph=True)
    assert [(c.op, c.backend) for c in log] == [(op.OP, "cpu"), (op.BACKWARD, "reference")]


def test_under_autocast():
    tensors, target = problem(9, 4, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(tensors, target)
        grads = torch.autograd.grad(loss, tensors[:2])
    half = [y.detach().bfloat16().requires_grad_() for y in tensors[:2]]
    expected = ours([*half, None], target)
    assert torch.equal(loss, expected) and grads[0].dtype == torch.float32
    assert torch.equal(grads[0], torch.autograd.grad(expected, half[0])[0].float())


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_opcheck_and_compile(options):
    tensors, target = problem(9, 4, 12, torch.float32, bias=True)
    numbers = op.Options(**{k: v for k, v in options.items() if k != "bias" and v is not None})
    torch.library.opcheck(
        torch.ops.genkern.linear_cross_entropy.default, (*tensors, target, *numbers)
    )
    eager = with_gradients(lambda t: ours(t, target, **options), tensors)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: ours(t, target, **options), fullgraph=True)
    with genkern.explain() as log:
        got = with_gradients(lambda t: compiled(*t), tensors)
    assert {choice.backend for choice in log} == {"cpu"}
    torch.testing.assert_close(got, eager)


def test_transforms_are_refused():
    (x, w, _), target = problem(9, 4, 12)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: ours([x, w.detach(), None], target), (x.detach(),), (x.detach(),))


def test_all_ignored_and_no_tokens():
    (x, w, _), _ = problem(4, 3, 5)
    target = torch.full((4,), -100)
    loss = ours([x, w, None], target)
    assert loss.isnan() and ours([x, w, None], target, reduction="sum") == 0
    (grad,) = torch.autograd.grad(ours([x, w, None], target, reduction="sum"), x)
    assert torch.equal(grad, torch.zeros_like(x))
    assert ours([x[:0], w, None], target[:0]).isnan()


@pytest.mark.parametrize(
    ("change", "exception", "sentence"),
    [
        ({"w": torch.ones(5, 2)}, ValueError, r"one d, not shapes \(4, 3\) and \(5, 2\)"),
        ({"w": torch.ones(5, 3).double()}, TypeError, "linear_weight must have input's dtype"),
        ({"b": torch.ones(4)}, ValueError, r"linear_bias must have the shape \(5,\), not \(4,\)"),
        ({"y": torch.ones(4)}, TypeError, "target must be a tensor of torch.int64"),
        ({"y": torch.ones(3).long()}, ValueError, r"target must have .* \(4,\).*not \(3,\)"),
        ({"y": torch.tensor([0, 1, 5, 0])}, IndexError, r"classes in \[0, 5\), not 5"),
        ({"y": torch.tensor([0, 1, -7, 0])}, IndexError, r"classes in \[0, 5\), not -7"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be 'mean', 'sum' or 'none'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], not 1.5"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive or None, not -1.0"),
    ],
)
def test_bad_arguments(change, exception, sentence):
    given = {"w": torch.ones(5, 3), "b": None, "y": torch.zeros(4).long(), **change}
    w, b, y = (given.pop(key) for key in "wby")
    with pytest.raises(exception, match=sentence):
        losses.linear_cross_entropy(torch.ones(4, 3), w, y, linear_bias=b, **given)
