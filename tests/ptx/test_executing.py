"""`ptx.executing` around what is not ours."""

import subprocess
import sys

import pytest
import torch

import genkern
from genkern import ptx
from genkern.backend import has_cuda
from genkern.ops.attention import cuda

FORWARD_MODE = """
import torch
from genkern import ptx

with ptx.executing() as launches:
    x = torch.ones(())
    assert torch.func.jvp(torch.sin, (x,), (x,))[1] == torch.cos(x)
assert not launches
"""


@pytest.mark.skipif(not has_cuda(), reason="the CUDA half was not built: `genkern info` says why")
def test_forward_mode_is_first_used_inside():
    """In a process of its own: torch prepares it once."""
    done = subprocess.run([sys.executable, "-c", FORWARD_MODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not has_cuda(), reason="the CUDA half was not built: `genkern info` says why")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the launch goes to the GPU")
def test_memory_that_was_freed_before_the_launch(monkeypatch):
    """As second order's facts once were: on a GPU other results lay there."""

    def address_of_nothing(call, kinds):
        q = call.inputs[0]
        return q.new_empty((kinds, *q.shape[:3]), dtype=torch.float32)

    monkeypatch.setattr(cuda.Call, "new_facts", address_of_nothing)
    q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    with ptx.executing(), genkern.use_backend("cuda"):
        out = genkern.attention(q, k, v)
        with pytest.raises(ptx.ExecutionError, match="writes 4 bytes at byte"):
            torch.autograd.grad(out.sum(), (q, k, v))
