"""L2SelfAttention2d against its formula, written out with differences."""

import pytest
import torch
import torch.nn.functional as F

import genkern
from genkern.nn import L2SelfAttention2d


def written_out(block, x):
    batch, _, height, width = x.shape
    q, v = (
        F.conv2d(x, layer.weight).reshape(batch, block.heads, block.dim_head, -1).mT
        for layer in (block.to_q, block.to_v)
    )
    null_key, null_value = (
        token[None, :, None].expand(batch, -1, -1, -1) for token in block.null_kv
    )
    keys, values = torch.cat([q, null_key], 2), torch.cat([v, null_value], 2)
    differences = q[:, :, :, None] - keys[:, :, None]
    weights = torch.softmax(-block.scale * (differences**2).sum(-1), -1)
    looked_up = (weights @ values).mT.reshape(batch, -1, height, width)
    return F.conv2d(looked_up, block.to_out.weight)


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (1, 6, 3, 5), (2, 6, 1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scale", [None, 1.5])
def test_is_the_formula(shape, memory_format, scale):
    block = L2SelfAttention2d(6, heads=2, dim_head=5, scale=scale).double()
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    inputs = [x, *block.parameters()]
    with genkern.explain() as log:
        out = block(x)
    assert [(choice.op, choice.backend) for choice in log] == [("attention", "cpu")]
    expected = written_out(block, x)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def test_r1_is_the_formulas():
    block = L2SelfAttention2d(4, heads=2, dim_head=3).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    penalties = []
    with genkern.explain() as log:
        for forward in (block, lambda x: written_out(block, x)):
            (slope,) = torch.autograd.grad(forward(x).square().sum(), x, create_graph=True)
            penalties.append(torch.autograd.grad((slope**2).sum(), list(block.parameters())))
    torch.testing.assert_close(*penalties, rtol=1e-9, atol=1e-10)
    assert ("attention.second", "cpu") in [(choice.op, choice.backend) for choice in log]


def test_second_derivative_where_all_distances_are_zero():
    """An image of one colour: every query is every key."""
    block = L2SelfAttention2d(2, heads=1, dim_head=2).double()
    with torch.no_grad():
        block.null_kv[0] = block.to_q.weight.sum((1, 2, 3))
    x = torch.ones(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(block, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_where_queries_are_keys(dtype):
    block = L2SelfAttention2d(4, heads=2, dim_head=8).to(dtype)
    x = (100 * torch.ones(2, 4, 4, 4, dtype=dtype)).requires_grad_()
    (slope,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    grads = [slope, x.grad, *(parameter.grad for parameter in block.parameters())]
    assert all(grad.isfinite().all() for grad in grads)


def test_autocast():
    block = L2SelfAttention2d(8, heads=2, dim_head=4)
    x = torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), block(x), rtol=0.05, atol=0.05)


def test_compiled():
    block = L2SelfAttention2d(4, heads=2, dim_head=3).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True)
    inputs = [x, *block.parameters()]
    results = [forward(x) for forward in (compiled, block)]
    torch.testing.assert_close(*results)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in results]
    torch.testing.assert_close(*grads)


def test_has_the_names_of_gigagan_pytorch():
    names = {name: list(p.shape) for name, p in L2SelfAttention2d(6, 2, 5).named_parameters()}
    assert names == {
        "null_kv": [2, 2, 5],
        "to_q.weight": [10, 6, 1, 1],
        "to_v.weight": [10, 6, 1, 1],
        "to_out.weight": [6, 10, 1, 1],
    }


@pytest.mark.parametrize("name", ["channels", "heads", "dim_head"])
def test_bad_sizes(name):
    sizes = {"channels": 4, "heads": 2, "dim_head": 3, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be positive, not 0"):
        L2SelfAttention2d(**sizes)


@pytest.mark.parametrize("shape", [(2, 8, 4), (2, 4, 4, 4)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match="x must be"):
        L2SelfAttention2d(8)(torch.zeros(shape))
