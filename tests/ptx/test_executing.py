"""`ptx.executing` around what is not ours."""

import subprocess
import sys

import pytest

from genkern.backend import has_cuda

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
