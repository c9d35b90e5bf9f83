"""Launches of Triton's attention kernels: the functions of kernels.py, with the same results."""

import torch

from genkern.ops import _triton
from genkern.ops._tensors import ARITHMETIC
from genkern.ops.attention import kernels
from genkern.ops.attention.arguments import check_longest
from genkern.ops.attention.triton import configurations
from genkern.ops.attention.triton.backward import (
    attention_backward_columns,
    attention_backward_rows,
)
from genkern.ops.attention.triton.bias_gradient import attention_bias_gradient
from genkern.ops.attention.triton.forward import attention_forward
from genkern.ops.attention.triton.problem import bias_of, heads, numbers, problem_of


def forward(inputs, fixed, settings, want_lse):
    """(out [B, H, N, dv], lse [B, H, N] or None, rows)"""
    call = Call(inputs, fixed, settings)
    q, _, v, _, _ = call.inputs
    out = kernels.laid_out_like(q, v.shape[3])
    lse = kernels.new_row_numbers(q) if want_lse else None
    rows = kernels.new_rows(q)
    call.over_queries(
        attention_forward, "forward", call.heads(out), *call.softmax(rows), call.numbers(lse)
    )
    return out, lse, rows


def backward(inputs, fixed, settings, rows, grad_out, grad_lse, wanted=kernels.ALL):
    """Gradients of the five inputs, each in its input's dtype."""
    call = Call(inputs, fixed, settings)
    grad_out, grad_lse = kernels.cotangents_of(call.inputs, grad_out, grad_lse)
    grads = kernels.new_gradients(call.inputs, wanted)
    levels = call.numbers(kernels.new_row_numbers(call.inputs[0]))
    known = *call.softmax(rows), call.heads(grad_out)
    call.over_queries(
        attention_backward_rows,
        "backward_rows",
        *known,
        call.numbers(grad_lse),
        levels,
        call.heads(grads[0]),
    )
    sums = call.column_sums(grads)
    if any(x is not None for x in (grads[1], grads[2], sums)):
        call.over_keys(
            attention_backward_columns,
            "backward_columns",
            *known,
            levels,
            call.heads(grads[1]),
            call.heads(grads[2]),
            call.numbers(sums),
        )
    row_sums = None if grad_lse is None else torch.where(rows[1] > 0, grad_lse, 0)
    call.finish_biases(grads, sums, row_sums, attention_bias_gradient, *known, levels)
    return kernels.in_dtypes_of(call.inputs, grads)


class Call:
    """What the launches of one pass share."""

    def __init__(self, inputs, fixed, settings):
        self.inputs = kernels.readable_inputs(inputs)
        self.fixed = fixed._replace(seed=_on(self.inputs[0].device, fixed.seed))
        self.settings = check_longest(self.inputs, fixed, settings)
        self.problem = problem_of(self.inputs, self.fixed, self.settings)

        self.is_heavy = bool(
            settings.softcap
            or settings.dropout_p
            or self.inputs[3] is not None
            or self.inputs[4] is not None
        )

    # ---- Arguments

    def heads(self, x):
        return heads(x, self.fixed)

    def numbers(self, x):
        return numbers(x, self.fixed)

    def softmax(self, rows):
        """(shifts, sums)"""
        return [self.numbers(x) for x in rows]

    # ---- Launches

    def over_queries(self, kernel, name, *args):
        """A program for every block of queries of every head."""
        q, starts = self.inputs[0], self.fixed.q_starts
        sequences, longest = q.shape[0], q.shape[2]
        if starts is not None:
            sequences, longest = starts.shape[0] - 1, self.settings.longest_q
        options = self._options(name)
        blocks = -(-longest // options["QUERIES"])
        self._launch(kernel, blocks * sequences * q.shape[1], *args, blocks, **options)

    def over_keys(self, kernel, name, *args):
        """A program for every block of keys of every key head."""
        k, starts = self.inputs[1], self.fixed.k_starts
        sequences, longest = k.shape[0], k.shape[2]
        if starts is not None:
            sequences, longest = starts.shape[0] - 1, self.settings.longest_k
        options = self._options(name)
        blocks = -(-longest // options["KEYS"])
        self._launch(kernel, blocks * sequences * k.shape[1], *args, blocks, **options)

    def over_bias(self, kernel, name, grad, *args):
        """A program for every tile of a bias."""
        B, H, N, M = grad.shape
        sharing = self.inputs[0].shape[1] // max(1, H), self.inputs[0].shape[0] // max(1, B)
        options = self._options(name)
        tiles = -(-N // options["QUERIES"]) * -(-M // options["KEYS"])
        self._launch(kernel, tiles * B * H, *args, bias_of(grad), H, *sharing, **options)

    def _launch(self, kernel, programs, *args, **options):
        if programs:
            with _triton.on_device(self.inputs[0]):
                _triton.launch(kernel, (programs,), self.problem, *args, **options)

    def _options(self, name):
        """The constants of a kernel, and its configuration."""
        import triton.language as tl

        q, _, v, _, _ = self.inputs
        d, dv = q.shape[3], v.shape[3]
        D, DV = (max(16, 1 << (max(n, 1) - 1).bit_length()) for n in (d, dv))
        chosen = configurations.choose(name, _triton.target(q), q.dtype, max(D, DV), self.is_heavy)
        wide = ARITHMETIC[q.dtype] == torch.float64
        return {
            "d": d,
            "dv": dv,
            "D": D,
            "DV": DV,
            "A": tl.float64 if wide else tl.float32,
            "PRECISION": "ieee",
            **chosen,
        }

    # ---- Gradients of biases, out of sums of a tile's rows or columns, or of whole tiles

    def column_sums(self, grads):
        """Memory [B, H, M] for them where a bias wants them, or None."""
        q, k, _, bias, _ = self.inputs
        of_bias = grads[3] is not None and not self._has_rows(bias) and self._has_keys(bias)
        if grads[4] is None and not of_bias:
            return None
        return q.new_empty(*q.shape[:2], k.shape[2], dtype=ARITHMETIC[q.dtype])

    def finish_biases(self, grads, column_sums, row_sums, kernel, *args):
        """Fills the gradients of both biases; row_sums [B, H, N], None: zero. `kernel` makes those
        of a bias with rows and keys of its own."""
        grad_bias, grad_key_bias = grads[3:]
        if grad_key_bias is not None:
            B, Hk, M = grad_key_bias.shape
            group = self.inputs[0].shape[1] // max(1, Hk)
            torch.sum(column_sums.view(B, Hk, group, M), 2, out=grad_key_bias)
        if grad_bias is None:
            return
        if not self._has_keys(grad_bias):
            if row_sums is None:
                grad_bias.zero_()
            else:
                grad_bias.copy_(row_sums[..., None].sum_to_size(grad_bias.shape))
        elif not self._has_rows(grad_bias):
            grad_bias.copy_(column_sums[:, :, None].sum_to_size(grad_bias.shape))
        else:
            self.over_bias(kernel, "bias_gradient", grad_bias, *args)

    def _has_rows(self, bias):
        return bias.shape[2] == self.inputs[0].shape[2]

    def _has_keys(self, bias):
        return bias.shape[3] == self.inputs[1].shape[2]


def _on(device, seed):
    """A seed drawn on the CPU moves without a wait."""
    return None if seed is None else seed.to(device, non_blocking=True)
