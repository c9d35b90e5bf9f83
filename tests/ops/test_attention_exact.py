"""How exact attention is on every instruction-set level of the CPU."""

import pytest
import torch
from attention_errors import CASES, assert_errors_are_eagers, report, results

import genkern

# Of fp32, whose errors stand highest above its floor, the most draws.
DRAWS = {torch.float32: 6, torch.float64: 2, torch.bfloat16: 2, torch.float16: 2}


def by_kernels(*args):
    with genkern.explain() as log:
        found = results(*args)
    ran = {(choice.op.removeprefix("attention"), choice.backend) for choice in log}
    assert ran == {(name, "cpu") for name in ("", ".backward", ".second", ".jvp")}, ran
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DRAWS, ids=lambda v: str(v).removeprefix("torch."))
def test_errors_are_eagers(dtype, case, cpu_level):
    assert_errors_are_eagers(report(case, dtype, DRAWS[dtype], by_kernels), dtype)


def test_a_single_key_that_counts(cpu_level):
    """Where one logit is far above the others the softmax is exactly one-hot: the output is that
    key's value and the logits have no gradient, to the last bit."""
    q, k, v = (torch.randn(1, 1, n, 16) for n in (70, 150, 150))
    q, k = (x.mul(100).requires_grad_() for x in (q, k))
    top, key = (q @ k.transpose(-2, -1) / 4).topk(2)
    alone = top[..., 0] - top[..., 1] > 110
    assert 0 < alone.sum() < alone.numel()
    out = genkern.attention(q, k, v)
    assert torch.equal(out[alone], v[0, 0, key[..., 0]][alone])
    dq, dk = torch.autograd.grad(out[alone].square().sum(), [q, k])
    assert not dq.any() and not dk.any()
