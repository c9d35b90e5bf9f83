"""Attention under torch.compile and torch.export: values, and every derivative."""

import pytest
import torch
from torch.autograd import forward_ad

import genkern

SIZES = {"q": (2, 3, 4, 2), "k": (2, 3, 5, 2), "v": (2, 3, 5, 3)}
STARTS = torch.tensor([0, 2, 5, 9], dtype=torch.int32)


def qkv(dtype=torch.float32, grad=True):
    return [torch.randn(size).to(dtype).requires_grad_(grad) for size in SIZES.values()]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def assert_all_close(got, expected, **tolerances):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, **tolerances)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "lse, softcap": {"return_lse": True, "softcap": 3.0},
    "lengths, window, l2": {
        "similarity": "l2",
        "window": (1, 1),
        "alignment": "lower_right",
        "key_lengths": torch.tensor([3, 5]),
    },
}


BACKENDS = ("aot_eager", torch.bfloat16), ("aot_eager", torch.float32), ("inductor", torch.float32)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled(options, backend, dtype):
    def step(q, k, v, mask):
        out = genkern.attention(q * 2, k, v, mask, **options)
        out = sum(x.float().sum() for x in out) if isinstance(out, tuple) else out
        return out.transpose(-2, -1).float().sin() if out.ndim else out

    inputs = [*qkv(dtype), torch.randn(3, 1, 5).to(dtype).requires_grad_()]
    expected = step(*inputs)
    with genkern.explain() as log:
        got = torch.compile(step, fullgraph=True, backend=backend)(*inputs)
        cotangent = torch.randn_like(got)
        grads = torch.autograd.grad(got, inputs, cotangent)
    ran = [(choice.op, choice.backend) for choice in log]
    assert ran == [("attention", "cpu"), ("attention.backward", "cpu")]
    tolerances = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(got, expected, **tolerances)
    assert_all_close(grads, torch.autograd.grad(expected, inputs, cotangent), **tolerances)


def test_compiled_with_one_tensor_as_all_three():
    x = torch.randn(2, 9, 4, requires_grad=True)
    compiled = torch.compile(lambda x: genkern.attention(x, x, x), fullgraph=True)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(genkern.attention(x, x, x).square().sum(), x)
    torch.testing.assert_close(got, expected)


def test_compiled_on_changing_shapes():
    compiled = torch.compile(genkern.attention, fullgraph=True, dynamic=True)
    for rows in (5, 8, 13):
        inputs = [torch.randn(2, 3, *size) for size in ((rows, 4), (7, 4), (7, 6))]
        torch.testing.assert_close(compiled(*inputs), genkern.attention(*inputs))


def test_compiled_sequences():
    inputs = [torch.randn(9, 2, n, requires_grad=True) for n in (4, 4, 3)]

    def step(*x):
        return genkern.attention_varlen(*x, STARTS, STARTS, is_causal=True).sin()

    got, expected = torch.compile(step, fullgraph=True)(*inputs), step(*inputs)
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(got)
    grads = (torch.autograd.grad(out, inputs, cotangent) for out in (got, expected))
    assert_all_close(*grads)
    broken = STARTS.clone()
    broken[1] = 50
    compiled = torch.compile(genkern.attention_varlen, backend="aot_eager")
    with pytest.raises(ValueError, match="cu_seqlens_q must not decrease"):
        compiled(*inputs, broken, broken)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_dropout(backend):
    """Another mask every time, the same in forward and backward."""
    v = torch.randn(1, 1, 40, 1, requires_grad=True)
    q = torch.zeros(1, 1, 30, 4)
    k = torch.zeros(1, 1, 40, 4)

    def step(v):
        return genkern.attention(q, k, v, dropout_p=0.5)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    first, second = compiled(v), compiled(v)
    assert not torch.equal(first, second)
    (grad,) = torch.autograd.grad(first.sum(), v)
    torch.testing.assert_close((grad * v).sum(), first.sum())


needs_traced_autograd = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch cannot trace torch.autograd.grad",
)


@needs_traced_autograd
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_penalty_inside_a_compiled_function(backend):
    def penalty(q, k, v, weight):
        out = genkern.attention(q @ weight, k, v)
        (grad,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
        return grad.square().sum()

    inputs = [*qkv(), torch.randn(2, 2, requires_grad=True)]
    expected = penalty(*inputs)
    with torch._dynamo.config.patch(trace_autograd_ops=True), genkern.explain() as log:
        got = torch.compile(penalty, fullgraph=True, backend=backend)(*inputs)
        grads = torch.autograd.grad(got, inputs)
    assert {(choice.op, choice.backend) for choice in log} == {
        (op, "cpu") for op in ("attention", "attention.backward", "attention.second")
    }
    torch.testing.assert_close(got, expected)
    assert_all_close(grads, torch.autograd.grad(expected, inputs))


def test_eager_penalty_beside_a_compiled_function():
    def network(q, k, v):
        return genkern.attention(q, k, v).sin()

    inputs = qkv()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")

    def gradients(plain):
        (grad,) = torch.autograd.grad(network(*inputs).sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(plain(*inputs).sum() + grad.square().sum(), inputs)

    assert_all_close(gradients(compiled), gradients(network))


def test_a_second_derivative_through_a_compiled_op_is_refused():
    inputs = qkv()
    out = torch.compile(genkern.attention, backend="aot_eager")(*inputs)
    with pytest.raises(RuntimeError, match=r"create_graph|double backward"):
        grads = torch.autograd.grad(out.sum(), inputs, create_graph=True)
        torch.autograd.grad(grads[0].square().sum(), inputs)


def test_tangents_into_a_compiled_function():
    q, k, v = qkv(grad=False)
    compiled = torch.compile(genkern.attention, backend="aot_eager")

    def tangent(function):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(q, q), k, v)).tangent

    torch.testing.assert_close(tangent(compiled), tangent(genkern.attention))


def _loss(*x):
    return genkern.attention(*x).sin().sum()


TRANSFORMS = {
    "jvp": lambda q, k, v: torch.func.jvp(
        lambda q: genkern.attention(q, k, v).sin(), (q,), (q.detach(),)
    )[1],
    "grad of grad": lambda q, k, v: torch.func.grad(
        lambda q: torch.func.grad(_loss)(q, k, v).square().sum()
    )(q),
    "jvp of grad": lambda q, k, v: torch.func.jvp(
        lambda q: torch.func.grad(_loss)(q, k, v), (q,), (q.detach(),)
    )[1],
    "vmap of grad": lambda *x: torch.func.vmap(torch.func.grad(_loss))(
        *(torch.stack([t, 2 * t]) for t in x)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_inside_a_compiled_function(transform):
    """And reverse mode through the outcome."""
    inputs = qkv(torch.float64)
    expected = transform(*inputs)
    got = torch.compile(transform, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(x.square().sum(), inputs) for x in (got, expected)]
    assert_all_close(*grads)


def test_export():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return genkern.attention(q, k, v, mask)

    inputs = [*qkv(grad=False), torch.randn(4, 5)]
    rows = torch.export.Dim("rows", min=2, max=99)
    shapes = {"q": {2: rows}, "k": None, "v": None, "mask": {0: rows}}
    program = torch.export.export(Attend(), tuple(inputs), dynamic_shapes=shapes)
    longer = [torch.randn(2, 3, 9, 2), *inputs[1:3], torch.randn(9, 5)]
    torch.testing.assert_close(program.module()(*longer), genkern.attention(*longer))
