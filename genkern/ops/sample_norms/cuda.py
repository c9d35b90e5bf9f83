"""Norms of samples in CUDA: all groups of all items in one launch forward and one backward. The
kernels and their plan are in csrc/sample_norms/sample_norms.cu."""

from genkern._native import native
from genkern.ops._cuda_lists import BLOCKS_AIM, ListMemory
from genkern.ops._device import on_device, stream


def forward(items, constants, sums, value):
    """Fills sums and value. `items`: the contract's; `constants`: function, center, weight and
    dtype as the contract numbers them."""
    with on_device(sums):
        on = stream(sums)
        plan = native.sample_norms_cuda_plan(items, constants[-1], False, BLOCKS_AIM)
        memory = ListMemory(plan, sums, on)
        native.sample_norms_forward_cuda(
            plan,
            *constants,
            memory.addresses,
            sums.data_ptr(),
            value.data_ptr(),
            on,
        )


def backward(items, constants, sums, grad_value):
    """Fills the items' gradients, where they have addresses."""
    with on_device(sums):
        on = stream(sums)
        plan = native.sample_norms_cuda_plan(items, constants[-1], True, BLOCKS_AIM)
        memory = ListMemory(plan, sums, on)
        native.sample_norms_backward_cuda(
            plan,
            *constants,
            memory.addresses,
            sums.data_ptr(),
            grad_value.data_ptr(),
            on,
        )
