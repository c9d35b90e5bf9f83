"""The gradients of biases on a GPU, out of sums of a tile's rows or columns, or of whole tiles.

A bias with rows and keys of its own has a kernel for its gradient. One that is broadcast over the
queries gets sums over columns of dS, which the sweep by columns has; one that is broadcast over the
keys sums over its rows. What is left, over batches and heads, torch adds up.
"""

import torch

from genkern.ops._tensors import ARITHMETIC


def new_column_sums(inputs, grads):
    """Memory [B, H, M] for them where a bias wants them, or None."""
    q, k, _, bias, _ = inputs
    of_bias = grads[3] is not None and not _has_rows(bias, inputs) and _has_keys(bias, inputs)
    if grads[4] is None and not of_bias:
        return None
    return q.new_empty(*q.shape[:2], k.shape[2], dtype=ARITHMETIC[q.dtype])


def finish(inputs, grads, column_sums, row_sums, of_tiles):
    """Fills the gradients of both biases. row_sums [B, H, N], None: zero. of_tiles(grad) makes the
    gradient of a bias with rows and keys of its own."""
    grad_bias, grad_key_bias = grads[3:]
    if grad_key_bias is not None:
        B, Hk, M = grad_key_bias.shape
        group = inputs[0].shape[1] // max(1, Hk)
        torch.sum(column_sums.view(B, Hk, group, M), 2, out=grad_key_bias)
    if grad_bias is None:
        return
    if not _has_keys(grad_bias, inputs):
        if row_sums is None:
            grad_bias.zero_()
        else:
            grad_bias.copy_(row_sums[..., None].sum_to_size(grad_bias.shape))
    elif not _has_rows(grad_bias, inputs):
        grad_bias.copy_(column_sums[:, :, None].sum_to_size(grad_bias.shape))
    else:
        of_tiles(grad_bias)


def _has_rows(bias, inputs):
    return bias.shape[2] == inputs[0].shape[2]


def _has_keys(bias, inputs):
    return bias.shape[3] == inputs[1].shape[2]
