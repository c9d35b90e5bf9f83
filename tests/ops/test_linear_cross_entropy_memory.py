"""Peak memory of linear cross-entropy, in fresh processes."""

import sys

import pytest

CODE = """
import ctypes, torch, torch.nn.functional as F
from genkern import losses

def problem(tokens, d, classes):
    x = torch.randn(tokens, d, requires_grad=True)
    return x, torch.randn(classes, d, requires_grad=True), torch.randint(classes, (tokens,))

def step(x, w, target):
    if {ours}:
        loss = losses.linear_cross_entropy(x, w, target)
    else:
        loss = F.cross_entropy(F.linear(x, w), target)
    return loss, *torch.autograd.grad(loss, (x, w))

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))

torch.set_num_threads(2)
step(*problem(8, 4, 16))
arguments = problem(8192, 16, 8000)
ctypes.CDLL(None).malloc_trim(0)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
kept = step(*arguments)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_peak_memory(python):
    peaks = {}
    for ours in (True, False):
        done = python(CODE.format(ours=ours))
        assert done.returncode == 0, done.stderr
        peaks[ours] = int(done.stdout)
    matrix = 8192 * 8000 * 4 / 1024
    assert peaks[False] > 1.9 * matrix
    # One chunk of 64 MiB, 256 MiB being the matrix of logits, and little beside it.
    assert peaks[True] < 0.35 * matrix
    assert peaks[True] < 0.15 * peaks[False]
