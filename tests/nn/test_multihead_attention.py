"""genkern.nn.MultiheadAttention against torch.nn.MultiheadAttention."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import genkern
from genkern.nn import MultiheadAttention

DOUBLE = torch.float64


def pair(*args, **options):
    """The same layer of genkern and of torch, with biases that are not zero."""
    ours = MultiheadAttention(*args, dtype=DOUBLE, **options)
    theirs = nn.MultiheadAttention(*args, dtype=DOUBLE, **options)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def draw_mask(kind, shape):
    """None, boolean or floating with -inf in it; the first key is left to everyone."""
    if kind is None:
        return None
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    return torch.randn(shape, dtype=DOUBLE).masked_fill(hidden, -torch.inf).requires_grad_()


def call(layer, inputs, options):
    """Output, weights, and the gradients of both together, of everything that has one."""
    out, weights = layer(*inputs, **options)
    torch.manual_seed(5)
    loss = (out * torch.randn(out.shape, dtype=out.dtype)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, dtype=out.dtype)).sum()
    wanted = {f"input {i}": x for i, x in enumerate(inputs)}
    wanted.update((k, x) for k, x in options.items() if getattr(x, "requires_grad", False))
    wanted.update(layer.named_parameters())
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    zeros = (
        torch.zeros_like(x) if g is None else g for x, g in zip(wanted.values(), grads, strict=True)
    )
    return out, weights, dict(zip(wanted, zeros, strict=True))


def assert_same(ours, theirs, inputs, options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")
        expected = call(theirs, inputs, options)
    got = call(ours, inputs, options)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


masks = st.sampled_from([None, "bool", "float"])


@settings(deadline=None, max_examples=120)
@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (3, 3, 6, 6, 4))),
    sources=st.sampled_from(["self", "shared", "three", "other widths"]),
    batch=st.sampled_from(["first", "second", "none"]),
    constructor=st.fixed_dictionaries(
        {"bias": st.booleans(), "add_bias_kv": st.booleans(), "add_zero_attn": st.booleans()}
    ),
    key_padding=masks,
    attn_mask=masks,
    mask_dim=st.sampled_from([2, 3]),
    need_weights=st.booleans(),
    average=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_is_torchs(
    sizes,
    sources,
    batch,
    constructor,
    key_padding,
    attn_mask,
    mask_dim,
    need_weights,
    average,
    seed,
):
    """Outputs, weights and gradients over the grid of all arguments."""
    torch.manual_seed(seed)
    B, heads, N, M, d = sizes
    E = heads * d
    M = N if sources == "self" else M
    B = 1 if batch == "none" else B
    widths = {"kdim": E + 1, "vdim": E + 2} if sources == "other widths" else {}
    ours, theirs = pair(E, heads, batch_first=batch == "first", **widths, **constructor)

    def sequence(length, width):
        shape = {"first": (B, length), "second": (length, B), "none": (length,)}[batch]
        return torch.randn(*shape, width, dtype=DOUBLE, requires_grad=True)

    query = sequence(N, E)
    key = query if sources == "self" else sequence(M, ours.kdim)
    value = key if sources in ("self", "shared") else sequence(M, ours.vdim)
    options = {
        "key_padding_mask": draw_mask(key_padding, (M,) if batch == "none" else (B, M)),
        "attn_mask": draw_mask(attn_mask, (N, M) if mask_dim == 2 else (B * heads, N, M)),
        "need_weights": need_weights,
        "average_attn_weights": average,
    }
    with genkern.explain() as log:
        assert_same(ours, theirs, (query, key, value), options)
    ran = [(choice.op, choice.backend) for choice in log]
    assert ran == ([] if need_weights else [("attention", "cpu"), ("attention.backward", "cpu")])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize(("N", "M"), [(5, 5), (3, 6), (6, 3)])
def test_the_causal_hint(N, M, padding, need_weights):
    ours, theirs = pair(8, 2, batch_first=True)
    inputs = [torch.randn(2, n, 8, dtype=DOUBLE, requires_grad=True) for n in (N, M, M)]
    options = {
        "attn_mask": torch.ones(N, M, dtype=torch.bool).triu(1),
        "is_causal": True,
        "key_padding_mask": draw_mask(padding, (2, M)),
        "need_weights": need_weights,
    }
    assert_same(ours, theirs, inputs, options)


@pytest.mark.parametrize("appended", ["add_bias_kv", "add_zero_attn"])
def test_all_see_an_appended_key_under_the_causal_hint(appended):
    """torch's result depends on need_weights here; ours is that of need_weights=True."""
    ours, theirs = pair(8, 2, **{appended: True})
    x = torch.randn(5, 2, 8, dtype=DOUBLE, requires_grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected, _ = theirs(x, x, x, attn_mask=mask, is_causal=True, need_weights=True)
    for need_weights in (False, True):
        got, _ = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)
        torch.testing.assert_close(got, expected)


def test_the_state_dict_is_torchs():
    options = {"add_bias_kv": True, "kdim": 5, "vdim": 6, "dropout": 0.1, "batch_first": True}
    for extra in ({}, options):
        torch.manual_seed(3)
        ours = MultiheadAttention(8, 2, **extra)
        torch.manual_seed(3)
        theirs = nn.MultiheadAttention(8, 2, **extra)
        torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()))
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert isinstance(ours, nn.MultiheadAttention)
        assert isinstance(pickle.loads(pickle.dumps(copy.deepcopy(ours))), MultiheadAttention)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours, _ = pair(16, 2, batch_first=True)
    x = torch.randn(2, 7, 16, dtype=DOUBLE)
    expected, _ = ours(x, x, x)
    mask = torch.zeros(7, 7)
    x, ours = x.to(dtype), ours.to(dtype)
    for need_weights, attn_mask in (
        (True, None),
        (False, None),
        (False, mask),
        (False, mask.to(dtype)),
    ):
        out, _ = ours(x, x, x, attn_mask=attn_mask, need_weights=need_weights)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.1)


def test_autocast():
    ours = MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)
    x = torch.randn(2, 7, 16)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    expected, _ = ours(x, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = ours(x, x, x, key_padding_mask=padding, need_weights=False)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


# ---- Dropout ------------------------------------------------------------------------------------


def test_dropout_with_weights_draws_as_torch_does():
    ours, theirs = pair(8, 2, dropout=0.4)
    x = torch.randn(5, 2, 8, dtype=DOUBLE)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(9)
        results.append(layer(x, x, x))
    torch.testing.assert_close(*results)


def test_dropout_without_weights():
    """Only in training, repeatable by the seed, and right in the mean."""
    ours, theirs = pair(8, 2, dropout=0.4, batch_first=True)
    x = torch.randn(1, 5, 8, dtype=DOUBLE)
    expected, _ = theirs.eval()(x, x, x)
    many = x.expand(8000, -1, -1)
    draws = []
    for _ in range(2):
        torch.manual_seed(9)
        draws.append(ours(many, many, many, need_weights=False)[0].detach())
    assert torch.equal(*draws)
    assert not torch.equal(draws[0][0], draws[0][1])
    spread = draws[0].std(0) / 8000**0.5
    assert ((draws[0].mean(0) - expected[0]).abs() < 5 * spread).all()
    out, _ = ours.eval()(x, x, x, need_weights=False)
    torch.testing.assert_close(out, expected)


# ---- Memory, masked rows ------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr():
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return result


@pytest.mark.parametrize(
    "masked", ["nothing", "padding", "causal", "causal and padding", "appended"]
)
def test_without_weights_nothing_is_n_by_m(masked):
    N, E = 256, 8
    ours = MultiheadAttention(E, 2, batch_first=True, add_zero_attn=masked == "appended")
    x = torch.randn(2, N, E, requires_grad=True)
    options = {}
    if "padding" in masked or masked == "appended":
        options["key_padding_mask"] = torch.arange(N).expand(2, N) >= 200
    if "causal" in masked:
        options.update(attn_mask=torch.ones(N, N, dtype=torch.bool).triu(1), is_causal=True)
    with Largest() as largest:
        out, _ = ours(x, x, x, need_weights=False, **options)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (grad**2).sum().backward()
    assert 0 < largest.elements < N * N
    with Largest() as largest:
        ours(x, x, x, **options)
    assert largest.elements >= N * N


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_sees_nothing_is_zero(kind, need_weights):
    """torch gives NaN."""
    ours, _ = pair(8, 2, batch_first=True)
    x = torch.randn(2, 4, 8, dtype=DOUBLE, requires_grad=True)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1] = True
    if kind == "float":
        mask = torch.zeros(4, 4, dtype=DOUBLE).masked_fill(mask, -torch.inf).requires_grad_()
    out, weights = ours(x, x, x, attn_mask=mask, need_weights=need_weights)
    torch.testing.assert_close(out[:, 1], ours.out_proj.bias.expand(2, 8))
    if need_weights:
        assert (weights[:, 1] == 0).all()
    inputs = [x, *ours.parameters(), *([mask] if kind == "float" else [])]
    grads = torch.autograd.grad((out**2).sum(), inputs, create_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    grads = torch.autograd.grad(sum((grad**2).sum() for grad in grads), inputs)
    assert all(grad.isfinite().all() for grad in grads)


# ---- Second derivatives, compilation, torch's own layers ----------------------------------------


def penalty_gradients(layer, x, options):
    """R1: the gradients, of the weights, of the squared gradient of the input."""
    out, _ = layer(x, x, x, **options)
    (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    return torch.autograd.grad((slope**2).sum(), list(layer.parameters()))


@pytest.mark.parametrize("padding", [None, "bool", "float"])
def test_r1(padding):
    ours, theirs = pair(8, 2, batch_first=True)
    x = torch.randn(3, 6, 8, dtype=DOUBLE, requires_grad=True)
    options = {"key_padding_mask": draw_mask(padding, (3, 6))}
    expected = penalty_gradients(theirs, x, options)
    with genkern.explain() as log:
        got = penalty_gradients(ours, x, {**options, "need_weights": False})
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert ("attention.second", "cpu") in [(choice.op, choice.backend) for choice in log]
    assert {choice.backend for choice in log} == {"cpu"}


@pytest.mark.parametrize("masked", [False, True])
def test_compiled(masked):
    ours, _ = pair(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8, dtype=DOUBLE, requires_grad=True)
    options = {"need_weights": False}
    if masked:
        options.update(
            key_padding_mask=draw_mask("bool", (2, 5)), attn_mask=draw_mask("float", (5, 5))
        )
    expected = call(ours, (x, x, x), options)
    got = call(torch.compile(ours, fullgraph=True), (x, x, x), options)
    got = (*got[:2], {name.removeprefix("_orig_mod."): grad for name, grad in got[2].items()})
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_r1_compiled():
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch does not trace autograd.grad inside a compiled function")
    ours, _ = pair(8, 2, batch_first=True)
    weights = list(ours.parameters())

    def penalty(x):
        out, _ = ours(x, x, x, need_weights=False)
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return slope.square().sum()

    x = torch.randn(3, 5, 8, dtype=DOUBLE, requires_grad=True)
    expected = torch.autograd.grad(penalty(x), weights)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = torch.autograd.grad(torch.compile(penalty, fullgraph=True)(x), weights)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_exported():
    ours, _ = pair(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8, dtype=DOUBLE)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        ours,
        (x, x, x),
        {"need_weights": False},
        dynamic_shapes={
            **{name: {0: batch} for name in ("query", "key", "value")},
            "need_weights": None,
        },
    )
    more = torch.randn(4, 5, 8, dtype=DOUBLE)
    got, _ = program.module()(more, more, more, need_weights=False)
    torch.testing.assert_close(got, ours(more, more, more)[0])


def test_tangents():
    """torch.func.jvp, of a loss that is then differentiated by reverse mode."""
    ours, theirs = pair(8, 2, batch_first=True)
    x, tangent = torch.randn(2, 2, 5, 8, dtype=DOUBLE)
    results = []
    for layer, need_weights in ((ours, False), (theirs, True)):

        def run(x, layer=layer, need_weights=need_weights):
            return layer(x, x, x, need_weights=need_weights)[0]

        out, along = torch.func.jvp(run, (x,), (tangent,))
        loss = (out - along).square().sum()
        results.append((along, torch.autograd.grad(loss, list(layer.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_in_torchs_transformer():
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, dtype=DOUBLE)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ours = copy.deepcopy(theirs)
    for block in ours.layers:
        attention = MultiheadAttention(8, 2, batch_first=True, dtype=DOUBLE)
        attention.load_state_dict(block.self_attn.state_dict())
        block.self_attn = attention
    x = torch.randn(2, 6, 8, dtype=DOUBLE)
    padding = torch.arange(6).expand(2, 6) >= torch.tensor([[6], [4]])
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    for options in (
        {},
        {"src_key_padding_mask": padding},
        {"mask": causal, "is_causal": True},
        {"mask": causal, "src_key_padding_mask": padding},
    ):
        with genkern.explain() as log:
            out = ours(x, **options)
        assert [(choice.op, choice.backend) for choice in log] == [("attention", "cpu")] * 2
        torch.testing.assert_close(out, theirs(x, **options), rtol=1e-9, atol=1e-10)
