"""Spectral normalization in CUDA: at most 2·iterations + 1 launches forward and 2 backward, however
many layers the list has. The contract is csrc/spectral_norm/work.h."""

import torch

from genkern._native import native
from genkern.ops._device import device_table, on_device, stream
from genkern.ops._tensors import DTYPE_NUMBER
from genkern.ops.spectral_norm.arguments import OP, ORDER_NUMBER


def forward(items, like, order, eps):
    """items: for each layer the fields of SpectralForward (csrc/spectral_norm/spectral_norm.h), in
    their order, addresses of tensors on the device of `like`, whose dtype the weights have."""
    _check_sizes(item[1:4] for item in items)
    work = native.spectral_norm_forward_work_cuda(
        items, DTYPE_NUMBER[like.dtype], ORDER_NUMBER[order], eps
    )
    _run(native.spectral_norm_forward_cuda, work, like)


def backward(items, like):
    """The same of SpectralBackward."""
    _check_sizes(item[2:5] for item in items)
    work = native.spectral_norm_backward_work_cuda(items, DTYPE_NUMBER[like.dtype])
    _run(native.spectral_norm_backward_cuda, work, like)


def _run(launcher, work, like):
    with on_device(like):
        scratch = torch.empty(work.scratch_bytes // 8, dtype=torch.float64, device=like.device)
        table = device_table(work.table, like.device)
        launcher(work, table.data_ptr(), scratch.data_ptr(), stream(like))


def _check_sizes(layouts):
    longest = native.spectral_norm_longest_cuda
    for outer, rows, inner in layouts:
        if max(rows, outer * inner) >= longest:
            raise ValueError(
                f"{OP}: the CUDA kernels take weights of less than {longest} rows and columns, and "
                f"this one has {rows} rows and {outer * inner} columns"
            )
