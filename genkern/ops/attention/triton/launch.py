"""Launches of Triton's attention kernels: the functions of kernels.py, with the same results."""

import torch

from genkern.ops.attention import bias_sums, kernels
from genkern.ops.attention.triton.backward import (
    attention_backward_columns,
    attention_backward_rows,
)
from genkern.ops.attention.triton.bias_gradient import attention_bias_gradient
from genkern.ops.attention.triton.call import Call
from genkern.ops.attention.triton.forward import attention_forward
from genkern.ops.attention.triton.jvp import attention_jvp
from genkern.ops.attention.triton.second import (
    attention_second_bias,
    attention_second_columns,
    attention_second_rows,
    attention_second_stats,
)


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
    grad_out, grad_lse = call.cotangents(grad_out, grad_lse)
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
    sums = bias_sums.new_column_sums(call.inputs, grads)
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
    of_tiles = call.of_bias_tiles(attention_bias_gradient, "bias_gradient", *known, levels)
    bias_sums.finish(call.inputs, grads, sums, row_sums, of_tiles)
    return kernels.in_dtypes_of(call.inputs, grads)


def second(inputs, fixed, settings, rows, grad_out, grad_lse, tangents, wanted=(True,) * 7):
    """The gradients of ⟨backward's results, tangents⟩ for the inputs, grad_out and grad_lse."""
    call = Call(inputs, fixed, settings)
    grad_out, grad_lse = call.cotangents(grad_out, grad_lse)
    grads = kernels.new_gradients(call.inputs, wanted[:5])
    of_out = kernels.laid_out_like(grad_out, call.inputs[2].shape[3]) if wanted[5] else None
    levels, taus, rhos = (kernels.new_row_numbers(call.inputs[0]) for _ in range(3))
    given = call.tangents(tangents), *call.softmax(rows), call.heads(grad_out)
    of_rows = [call.numbers(x) for x in (levels, taus, rhos)]
    call.over_queries(
        attention_second_stats, "second_stats", *given, call.numbers(grad_lse), *of_rows
    )
    known = *given, *of_rows
    for of_q, of_o in call.turns("second_rows", (grads[0], None), (None, of_out)):
        results = call.heads(of_q), call.heads(of_o)
        call.over_queries(attention_second_rows, "second_rows", *known, *results)
    sums = bias_sums.new_column_sums(call.inputs, grads)
    turns = call.turns("second_columns", (grads[1], sums, None), (None, None, grads[2]))
    for of_k, of_bias, of_v in turns:
        results = call.heads(of_k), call.heads(of_v), call.numbers(of_bias)
        call.over_keys(attention_second_columns, "second_columns", *known, *results)
    of_tiles = call.of_bias_tiles(attention_second_bias, "second_bias", *known)
    bias_sums.finish(call.inputs, grads, sums, None, of_tiles)
    return *kernels.in_dtypes_of(call.inputs, grads), of_out, taus if wanted[6] else None


def jvp(inputs, fixed, settings, rows, tangents):
    """The derivatives of out and lse along the tangents of the inputs."""
    call = Call(inputs, fixed, settings)
    q, _, v, _, _ = call.inputs
    out, lse = kernels.laid_out_like(q, v.shape[3]), kernels.new_row_numbers(q)
    call.over_queries(
        attention_jvp,
        "jvp",
        call.tangents(tangents),
        *call.softmax(rows),
        call.heads(out),
        call.numbers(lse),
    )
    return out, lse
