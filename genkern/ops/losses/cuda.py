"""Adversarial losses in CUDA: a list of discriminators in one launch forward, two where means are
subtracted, and one backward. The kernels and their plan are in csrc/losses/adversarial.cu."""

import torch

from genkern._native import native
from genkern.ops._cuda_lists import BLOCKS_AIM, ListMemory
from genkern.ops._device import on_device, stream
from genkern.ops._tensors import ARITHMETIC, DTYPE_NUMBER


def forward(form, factor, stats, terms, count, like):
    """(loss, statistics [4 · count] or None, totals that the backward wants or None) of the
    contract's terms, `count` of them, whose gradients, where they have addresses, are filled for a
    grad_loss of 1; `like` is a tensor of their dtype and device."""
    dtype = DTYPE_NUMBER[like.dtype]
    with on_device(like):
        on = stream(like)
        loss = like.new_empty((), dtype=ARITHMETIC[like.dtype])
        statistics = loss.new_empty(4 * count) if stats else None
        averaged = form.pairing == "average"
        totals = loss.new_empty(4 * count, dtype=torch.float64) if averaged else None
        plan = native.adversarial_cuda_plan(form.native(), dtype, terms, False, BLOCKS_AIM)
        memory = ListMemory(plan, like, on)
        native.adversarial_forward_cuda(
            plan,
            form.native(),
            dtype,
            factor,
            count,
            memory.addresses,
            totals.data_ptr() if averaged else 0,
            loss.data_ptr(),
            statistics.data_ptr() if stats else 0,
            on,
        )
    return loss, statistics, totals


def backward(form, factor, terms, count, totals, grad_loss, like, is_done_for_one):
    """Fills the terms' gradients. `is_done_for_one`: the forward has filled them, and they are
    right where grad_loss is 1, which only the device knows."""
    dtype = DTYPE_NUMBER[like.dtype]
    with on_device(like):
        on = stream(like)
        plan = native.adversarial_cuda_plan(form.native(), dtype, terms, True, BLOCKS_AIM)
        memory = ListMemory(plan, like, on)
        native.adversarial_backward_cuda(
            plan,
            form.native(),
            dtype,
            factor,
            count,
            memory.addresses,
            0 if totals is None else totals.data_ptr(),
            grad_loss.data_ptr(),
            is_done_for_one,
            on,
        )
