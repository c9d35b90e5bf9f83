"""KL divergence of diagonal Gaussians in CUDA: one launch forward and one backward. The kernels are
in csrc/gaussian_kl/gaussian_kl.cu."""

from genkern._native import native
from genkern.ops._cuda_lists import BLOCKS_AIM, on_the_device
from genkern.ops._device import on_device, stream


def forward(problem, like, terms, total, factor):
    """Fills the elements' terms, or the address `total` with `factor` times their sum. `problem`:
    rows, numbers in a row, the contract's tensors and dtype; `like` is one of the tensors."""
    with on_device(like):
        plan = _plan(problem)
        table, partials = on_the_device(plan, like) if total else (None, None)
        native.gaussian_kl_forward_cuda(
            plan,
            *problem,
            table.data_ptr() if total else 0,
            partials.data_ptr() if total else 0,
            terms,
            total,
            factor,
            stream(like),
        )


def backward(problem, like, gradients, upstream, each_upstream, factor):
    """Fills the gradients, where they have addresses."""
    with on_device(like):
        native.gaussian_kl_backward_cuda(
            _plan(problem), *problem, gradients, upstream, each_upstream, factor, stream(like)
        )


def _plan(problem):
    rows, size, _, dtype = problem
    return native.gaussian_kl_cuda_plan(rows * size, dtype, BLOCKS_AIM)
