"""Launches of the CPU's attention kernels: addresses, strides, and memory for the results. Those of
CUDA's (cuda.py) and Triton's kernels (triton/launch.py) are the same functions, and share what is
here.

The contract is in csrc/attention/attention.h. `inputs` is (q, k, v, bias, key_bias), `fixed` and
`settings` are the tuples of arguments.py; `rows` [rows_kept, B, H, N] is what the forward keeps. A
tangent or cotangent that is None is zero, a result that is not wanted is None.
"""

import importlib
import sys

import torch

from genkern._native import native
from genkern.ops._tensors import ARITHMETIC, DTYPE_NUMBER, is_ordinary, materialized
from genkern.ops.attention.arguments import OP, check_values

NAMES = ("q", "k", "v", "attn_mask", "the key bias")
ALL = (True,) * 5

_NO_HEADS = (0, 0, 0, 0)
_NO_NUMBERS = (0, 0, 0)
_NO_BIAS = (0, 0, 0, 0, 0, 0)
_NO_BIAS_GRADIENT = (0, 0, 0, 0, 0)
_STORAGE, _ARITHMETIC, _BOOLEAN = range(3)


def launches(backend):
    """The module whose functions launch the backend's kernels."""
    if backend == "triton":
        return importlib.import_module("genkern.ops.attention.triton.launch")
    if backend == "cuda":
        return importlib.import_module("genkern.ops.attention.cuda")
    if backend == "reference":
        return importlib.import_module("genkern.ops.attention.by_reference")
    return sys.modules[__name__]


def forward(inputs, fixed, settings, want_lse):
    """(out [B, H, N, dv], lse [B, H, N] or None, rows)"""
    inputs = readable_inputs(inputs)
    q, _, v, _, _ = inputs
    out = laid_out_like(q, v.shape[3])
    lse = new_row_numbers(q) if want_lse else None
    rows = new_rows(q, rows_kept(q, v))
    native.attention_forward(
        _problem(inputs, fixed, settings),
        heads_address(out, fixed),
        *_row_addresses(rows, fixed),
        _kept_out_address(rows, fixed),
        numbers_address(lse, fixed),
    )
    return out, lse, rows


def backward(inputs, fixed, settings, rows, grad_out, grad_lse, wanted=ALL):
    """Gradients of the five inputs, each in its input's dtype."""
    inputs = readable_inputs(inputs)
    grads = new_gradients(inputs, wanted)
    cotangents = cotangents_of(inputs, grad_out, grad_lse)
    native.attention_backward(
        _problem(inputs, fixed, settings),
        *_row_addresses(rows, fixed),
        _kept_out_address(rows, fixed),
        *_cotangent_addresses(cotangents, fixed),
        *_gradient_addresses(grads, inputs, fixed),
    )
    return in_dtypes_of(inputs, grads)


def second(inputs, fixed, settings, rows, grad_out, grad_lse, tangents, wanted=(True,) * 7):
    """The gradients of ⟨backward's results, tangents⟩ for the inputs, grad_out and grad_lse."""
    inputs = readable_inputs(inputs)
    tangents = readable_tangents(inputs, tangents)
    cotangents = cotangents_of(inputs, grad_out, grad_lse)
    grads = new_gradients(inputs, wanted[:5])
    of_out = laid_out_like(cotangents[0], inputs[2].shape[3]) if wanted[5] else None
    of_lse = new_row_numbers(inputs[0]) if wanted[6] else None
    addresses = _gradient_addresses(grads, inputs, fixed)
    native.attention_second(
        _problem(inputs, fixed, settings),
        *_row_addresses(rows, fixed),
        *_cotangent_addresses(cotangents, fixed),
        *tangent_addresses(tangents, inputs, fixed),
        *addresses[:3],
        heads_address(of_out, fixed),
        numbers_address(of_lse, fixed),
        *addresses[3:],
    )
    return *in_dtypes_of(inputs, grads), of_out, of_lse


def jvp(inputs, fixed, settings, rows, tangents):
    """The derivatives of out and lse along the tangents of the inputs."""
    rows = _row_addresses(rows, fixed)
    return _jvp(inputs, fixed, settings, rows, tangents, None, None)


def forward_and_jvp(inputs, fixed, settings, tangents, want_lse):
    """(out, lse or None, their derivatives along the tangents of the inputs)"""
    inputs = readable_inputs(inputs)
    out = laid_out_like(inputs[0], inputs[2].shape[3])
    lse = new_row_numbers(inputs[0]) if want_lse else None
    rows = (_NO_NUMBERS, _NO_NUMBERS)
    return out, lse, *_jvp(inputs, fixed, settings, rows, tangents, out, lse)


def _jvp(inputs, fixed, settings, rows, tangents, primal_out, primal_lse):
    inputs = readable_inputs(inputs)
    tangents = readable_tangents(inputs, tangents)
    out = laid_out_like(inputs[0], inputs[2].shape[3])
    lse = new_row_numbers(inputs[0])
    native.attention_jvp(
        _problem(inputs, fixed, settings),
        *rows,
        *tangent_addresses(tangents, inputs, fixed),
        heads_address(out, fixed),
        numbers_address(lse, fixed),
        heads_address(primal_out, fixed),
        numbers_address(primal_lse, fixed),
    )
    return out, lse


# ---- Memory -------------------------------------------------------------------------------------


def laid_out_like(x, last):
    """An empty [*x.shape[:3], last] whose first three dimensions lie in memory in x's order."""
    B, H, N = x.shape[:3]
    strides = x.stride()[:3]
    if strides[0] >= strides[1] >= strides[2] and strides[2]:
        return x.new_empty((B, H, N, last))
    if any(stride == 0 and size > 1 for stride, size in zip(strides, x.shape, strict=False)):
        return x.new_empty((B, H, N, last))
    order = sorted(range(3), key=lambda i: -strides[i])
    result = x.new_empty((*(x.shape[i] for i in order), last))
    return result.permute(*(order.index(i) for i in range(3)), 3)


def new_row_numbers(q):
    return q.new_empty(q.shape[:3], dtype=ARITHMETIC.get(q.dtype, q.dtype))


def new_rows(q, kept=2):
    return q.new_empty((kept, *q.shape[:3]), dtype=ARITHMETIC.get(q.dtype, q.dtype))


def rows_kept(q, v):
    """The softmax's shift and sum; and where the backward on AMX wants it, out in fp32."""
    on_amx = q.dtype == torch.bfloat16 and q.device.type == "cpu" and native.cpu_level() == "amx"
    return 2 + v.shape[3] if on_amx else 2


def with_out(rows, q, out):
    """rows with out behind them, where the CPU's kernels would have kept it."""
    if rows.shape[0] == rows_kept(q, out):
        return rows
    return torch.cat((rows[:2], out.permute(3, 0, 1, 2)))


def new_gradients(inputs, wanted):
    """Empty results for the inputs; the biases' in the arithmetic dtype."""
    q, k, v, bias, key_bias = inputs
    arithmetic = ARITHMETIC.get(q.dtype, q.dtype)
    return (
        laid_out_like(q, q.shape[3]) if wanted[0] else None,
        laid_out_like(k, k.shape[3]) if wanted[1] else None,
        laid_out_like(v, v.shape[3]) if wanted[2] else None,
        q.new_empty(bias.shape, dtype=arithmetic) if has_gradient(bias, wanted[3]) else None,
        q.new_empty(key_bias.shape, dtype=arithmetic)
        if has_gradient(key_bias, wanted[4])
        else None,
    )


def has_gradient(x, wanted=True):
    return wanted and x is not None and x.dtype != torch.bool


def in_dtypes_of(inputs, grads):
    bias, grad_bias = inputs[3], grads[3]
    if grad_bias is None or grad_bias.dtype == bias.dtype:
        return grads
    return *grads[:3], grad_bias.to(bias.dtype), grads[4]


# ---- What the kernels can read ------------------------------------------------------------------


def readable_inputs(inputs):
    q, k, v, bias, key_bias = inputs
    return (
        _readable("q", q),
        _readable("k", k),
        _readable("v", v),
        None if bias is None else materialized(OP, "attn_mask", bias),
        None if key_bias is None else _readable("attn_mask", key_bias),
    )


def _readable(name, x):
    """Materialised, the last dimension contiguous."""
    if not is_ordinary(x):
        x = materialized(OP, name, x)
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def readable_tangents(inputs, tangents):
    """Of the inputs' dtypes: a boolean mask has no tangent."""
    return tuple(
        _readable_tangent(x, t, i) for i, (x, t) in enumerate(zip(inputs, tangents, strict=True))
    )


def _readable_tangent(x, tangent, place):
    if tangent is None or not has_gradient(x):
        return None
    if tangent.dtype != x.dtype:
        tangent = tangent.to(x.dtype)
    if place == 3:
        return materialized(OP, "the tangent of attn_mask", tangent)
    return _readable(f"the tangent of {NAMES[place]}", tangent)


def cotangents_of(inputs, grad_out, grad_lse):
    q, _, v, _, _ = inputs
    if grad_out is None:
        grad_out = q.new_zeros(()).expand(*q.shape[:3], v.shape[3])
    return (
        _readable("grad_out", grad_out),
        None if grad_lse is None else _readable("grad_lse", grad_lse),
    )


# ---- Addresses ----------------------------------------------------------------------------------


def _problem(inputs, fixed, settings):
    """For the CPU, where values can be read."""
    _, q_starts, _, seed = fixed
    if q_starts is not None or fixed.key_lengths is not None:
        settings = check_values(inputs, fixed, settings)
    N, M = inputs[0].shape[2], inputs[1].shape[2]
    if q_starts is not None:
        N, M = settings.longest_q, settings.longest_k
    seed = 0 if seed is None else seed.item() & 0xFFFFFFFFFFFFFFFF
    return problem_arguments(inputs, fixed, settings, seed, N, M)


def problem_arguments(inputs, fixed, settings, seed, N, M):
    """The contract's problem. N, M: all rows, or of several sequences what the backend wants."""
    q, k, v, bias, key_bias = inputs
    B, H, _, d = q.shape
    _, Hk, _, dv = v.shape
    key_lengths, q_starts, k_starts, _ = fixed
    scale, softcap, dropout_p, left, right, lower_right, _, _ = settings
    if q_starts is not None:
        B = q_starts.shape[0] - 1
    if H == 0:  # no batch of one head: the kernels divide by the number of heads
        B, H, Hk = 0, 1, 1
    return (
        DTYPE_NUMBER[q.dtype],
        (B, H, Hk, N, M, d, dv),
        (scale, softcap, dropout_p),
        (left, right, lower_right),
        seed,
        torch.get_num_threads(),
        (_flat_address(q_starts), _flat_address(k_starts), _flat_address(key_lengths)),
        _NO_BIAS if bias is None else _bias(bias, q),
        numbers_address(key_bias, fixed),
        heads_address(q, fixed),
        heads_address(k, fixed),
        heads_address(v, fixed),
    )


def _flat_address(x):
    return 0 if x is None else x.data_ptr()


def heads_address(x, fixed):
    if x is None:
        return _NO_HEADS
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch if fixed.q_starts is None else 0, head, row


def numbers_address(x, fixed):
    if x is None:
        return _NO_NUMBERS
    batch, head, _ = x.stride()
    return x.data_ptr(), batch if fixed.q_starts is None else 0, head


def _row_addresses(rows, fixed):
    kind, batch, head, _ = rows.stride()
    batch = batch if fixed.q_starts is None else 0
    shift = rows.data_ptr()
    return (shift, batch, head), (shift + kind * rows.element_size(), batch, head)


def _kept_out_address(rows, fixed):
    if rows.shape[0] == 2:
        return _NO_HEADS
    kind, batch, head, _ = rows.stride()
    batch = batch if fixed.q_starts is None else 0
    return rows.data_ptr() + 2 * kind * rows.element_size(), kind, batch, head


def _bias(x, q):
    kind = _BOOLEAN if x.dtype == torch.bool else _STORAGE if x.dtype == q.dtype else _ARITHMETIC
    return x.data_ptr(), kind, *_bias_strides(x)


def _bias_strides(x):
    return (s if size > 1 else 0 for s, size in zip(x.stride(), x.shape, strict=True))


def bias_gradient_address(x):
    return _NO_BIAS_GRADIENT if x is None else (x.data_ptr(), *_bias_strides(x))


def _cotangent_addresses(cotangents, fixed):
    grad_out, grad_lse = cotangents
    return heads_address(grad_out, fixed), numbers_address(grad_lse, fixed)


def tangent_addresses(tangents, inputs, fixed):
    *heads, bias, key_bias = tangents
    return (
        *(heads_address(x, fixed) for x in heads),
        _NO_BIAS if bias is None else _bias(bias, inputs[0]),
        numbers_address(key_bias, fixed),
    )


def _gradient_addresses(grads, inputs, fixed):
    *heads, bias, key_bias = grads
    return (
        *(heads_address(x, fixed) for x in heads),
        bias_gradient_address(bias),
        numbers_address(key_bias, fixed),
    )
