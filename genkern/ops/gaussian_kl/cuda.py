"""KL divergence of diagonal Gaussians in CUDA: one launch forward and one backward. The kernels are
in csrc/gaussian_kl/gaussian_kl.cu."""

from genkern._native import native
from genkern.ops._cuda_lists import BLOCKS_AIM, ListMemory
from genkern.ops._device import on_device, stream


def forward(problem, like, terms, total, factor):
    """Fills the elements' terms, or the address `total` with `factor` times their sum. `problem`:
    rows, numbers in a row, the contract's tensors and dtype; `like` is one of the tensors."""
    with on_device(like):
        on, plan = stream(like), _plan(problem, bool(total))
        memory = ListMemory(plan, like, on)
        native.gaussian_kl_forward_cuda(plan, *problem, memory.addresses, terms, total, factor, on)


def backward(problem, like, gradients, upstream, each_upstream, factor):
    """Fills the gradients, where they have addresses."""
    with on_device(like):
        native.gaussian_kl_backward_cuda(
            _plan(problem, False),
            *problem,
            gradients,
            upstream,
            each_upstream,
            factor,
            stream(like),
        )


def _plan(problem, with_sum):
    rows, size, _, dtype = problem
    return native.gaussian_kl_cuda_plan(rows * size, dtype, with_sum, BLOCKS_AIM)
