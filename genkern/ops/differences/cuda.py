"""Mean differences of pairs of tensors in CUDA: a list of pairs in one launch forward and one
backward. The kernels and their plan are in csrc/differences/differences.cu."""

from genkern._native import native
from genkern.ops._cuda_lists import BLOCKS_AIM, ListMemory
from genkern.ops._device import on_device, stream
from genkern.ops._tensors import ARITHMETIC, DTYPE_NUMBER


def forward(distance, pairs, like):
    """The loss of the contract's pairs, whose gradients, where they have addresses, are filled for
    a grad_loss of 1; `like` is a tensor of their dtype and device."""
    dtype = DTYPE_NUMBER[like.dtype]
    with on_device(like):
        on = stream(like)
        loss = like.new_empty((), dtype=ARITHMETIC[like.dtype])
        plan = native.differences_cuda_plan(pairs, dtype, False, BLOCKS_AIM)
        memory = ListMemory(plan, like, on)
        native.differences_forward_cuda(
            plan,
            distance,
            dtype,
            memory.addresses,
            loss.data_ptr(),
            on,
        )
    return loss


def backward(distance, pairs, like, grad_loss, is_done_for_one):
    """Fills the pairs' gradients. `is_done_for_one`: the forward has filled them, and they are
    right where grad_loss is 1, which only the device knows."""
    dtype = DTYPE_NUMBER[like.dtype]
    with on_device(like):
        on = stream(like)
        plan = native.differences_cuda_plan(pairs, dtype, True, BLOCKS_AIM)
        memory = ListMemory(plan, like, on)
        native.differences_backward_cuda(
            plan,
            distance,
            dtype,
            memory.addresses,
            grad_loss.data_ptr(),
            is_done_for_one,
            on,
        )
