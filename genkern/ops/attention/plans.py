"""The short way from a call to the CPU's kernels: for q, k and v with four dimensions, without
lengths, window, dropout, softcap or the gradient of a mask, in plain eager mode.

Small calls cost what Python makes of them: checks, strides, fifty numbers for the binding. All that
follows from shapes, strides and dtypes, so it is done once and kept as a `Plan`; what is left of a
later call are the tensors' kinds, memory for the results, and addresses. A call that does not fit
gets None here, and goes the long way (op.py), which also says what is wrong with bad arguments.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from genkern import backend as backends
from genkern._native import native
from genkern.ops._autograd import direct_apply, transforms_active
from genkern.ops._tensors import ARITHMETIC, PLAIN, is_ordinary
from genkern.ops.attention import arguments, autograd, kernels
from genkern.ops.attention.arguments import NOTHING_FIXED, OP

MOST_PLANS = 1024
BACKWARD = OP + ".backward"
_REASON = "the tensors' device"
_plans = {}  # a plan, or None where such calls have none, by _signature


class Plan(NamedTuple):
    """`native` launches. `new`: for results like q, k, v and out, what allocates them; `rows`:
    the shape and dtype of the numbers that the forward keeps; `layout`: the strides of q, k, v and
    the mask."""

    native: Any
    settings: arguments.Settings
    new: tuple
    rows: tuple
    layout: tuple


def attention(q, k, v, mask, is_causal, scale, enable_gqa):
    """out, or None where the call must go the long way."""
    if not (type(q) in PLAIN and type(k) in PLAIN and type(v) in PLAIN):
        return None
    signature_of_mask = None
    if mask is not None:
        if type(mask) not in PLAIN or mask.requires_grad or not (mask.is_cpu and is_ordinary(mask)):
            return None
        signature_of_mask = mask.shape, mask.stride(), mask.dtype
    asked_for = backends.wanted()
    if (
        not (q.is_cpu and k.is_cpu and v.is_cpu)
        or (asked_for is not None and asked_for != "cpu")
        or transforms_active()
        or forward_ad._current_level >= 0
        or (torch.is_autocast_enabled("cpu") and _are_cast(q, k, v, mask))
    ):
        return None
    signature = (
        q.shape,
        k.shape,
        v.shape,
        q.stride(),
        k.stride(),
        v.stride(),
        q.dtype,
        k.dtype,
        v.dtype,
        signature_of_mask,
        is_causal,
        scale,
        enable_gqa,
        native.cpu_level(),  # which the kept rows hang on
    )
    plan = _plans.get(signature, _plans)
    if plan is _plans:
        plan = _plan(q, k, v, mask, is_causal, scale, enable_gqa)
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[signature] = plan
    if plan is None or not (is_ordinary(q) and is_ordinary(k) and is_ordinary(v)):
        return None
    if backends.listeners:
        backends.record(OP, "cpu", _REASON if asked_for is None else "asked for")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _apply(plan, q, k, v, mask)
    return _forward(plan, q, k, v, mask, 0)


def _are_cast(*tensors):
    dtype = torch.get_autocast_dtype("cpu")
    return any(x is not None and x.dtype not in (dtype, torch.bool) for x in tensors)


def _plan(q, k, v, mask, is_causal, scale, enable_gqa):
    """Of the first call of a kind; None where one of its arguments is not as the kernels want it,
    be it wrong or only to be copied first."""
    try:
        arguments.check_qkv(q, k, v)
        settings = arguments.checked_settings(
            q.shape[-1], 0.0, is_causal, scale, None, "upper_left", None, "dot"
        )
        *canonical, _ = arguments.broadcast_qkv(q, k, v, enable_gqa)
        if q.dtype not in ARITHMETIC or any(
            x is not y for x, y in zip(canonical, (q, k, v), strict=True)
        ):
            return None
        inputs = (q, k, v, *_biases(mask, q, k))
    except (TypeError, ValueError):
        return None
    readable = kernels.readable_inputs(inputs)
    if any(x is not y for x, y in zip(readable, inputs, strict=True)):
        return None
    if mask is not None and mask.data_ptr() not in (
        x.data_ptr() for x in inputs[3:] if x is not None
    ):
        return None
    results = (q, q.shape[3]), (k, k.shape[3]), (v, v.shape[3]), (q, v.shape[3])
    examples = [kernels.laid_out_like(*result) for result in results]
    *grads, out = (kernels.heads_address(x, NOTHING_FIXED) for x in examples)
    return Plan(
        native.AttentionPlan(
            kernels.problem_arguments(
                *(inputs, NOTHING_FIXED, settings, 0, q.shape[2], k.shape[2])
            ),
            *(out, *grads),
            kernels.rows_kept(q, v),
        ),
        settings,
        tuple(_allocator(*result, x) for result, x in zip(results, examples, strict=True)),
        ((kernels.rows_kept(q, v), *q.shape[:3]), ARITHMETIC[q.dtype]),
        (q.stride(), k.stride(), v.stride(), None if mask is None else mask.stride()),
    )


def _biases(mask, q, k):
    return (None, None) if mask is None else arguments.canonical_mask(mask, q, k, q.shape[:2])


def _allocator(x, last, example):
    """What makes an empty tensor with the example's strides of one like x: None, where that is
    torch.empty_like, the quickest."""
    if x.shape == example.shape and torch.empty_like(x).stride() == example.stride():
        return None
    return lambda tensor: kernels.laid_out_like(tensor, last)


def _empty(new, x):
    return torch.empty_like(x) if new is None else new(x)


def _forward(plan, q, k, v, mask, rows):
    new = plan.new[3]
    out = torch.empty_like(q) if new is None else new(q)
    plan.native.forward(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        out.data_ptr(),
        rows,
        torch.get_num_threads(),
    )
    return out


class _Attention(torch.autograd.Function):
    """autograd.Attention for a plan, with few arguments; torch.func cannot transform it."""

    @staticmethod
    def forward(ctx, plan, q, k, v, mask):
        shape, dtype = plan.rows
        rows = q.new_empty(shape, dtype=dtype)
        out = _forward(plan, q, k, v, mask, rows.data_ptr())
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, mask, rows)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, mask, rows = ctx.saved_tensors
        plan, needed = ctx.plan, ctx.needs_input_grad
        # Hooks on saved tensors may have laid them out anew.
        rows = rows.contiguous()
        layout = (q.stride(), k.stride(), v.stride(), None if mask is None else mask.stride())
        if (
            layout != plan.layout
            or torch.is_grad_enabled()
            or transforms_active()
            or forward_ad._current_level >= 0
            or not (type(grad_out) in PLAIN and is_ordinary(grad_out))
        ):
            inputs, wanted = (q, k, v, *_biases(mask, q, k)), (*needed[1:4], False, False)
            call = inputs, NOTHING_FIXED, plan.settings, rows, grad_out, None, wanted
            return None, *autograd.backward(autograd.ON["cpu"], *call)[:3], None
        if backends.listeners:
            backends.record(BACKWARD, "cpu", "the forward ran there")
        if grad_out.stride(3) != 1:
            grad_out = grad_out.contiguous()
        new_q, new_k, new_v, _ = plan.new
        grad_q = _empty(new_q, q) if needed[1] else None
        grad_k = _empty(new_k, k) if needed[2] else None
        grad_v = _empty(new_v, v) if needed[3] else None
        plan.native.backward(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            rows.data_ptr(),
            grad_out.data_ptr(),
            grad_out.stride(),
            0 if grad_q is None else grad_q.data_ptr(),
            0 if grad_k is None else grad_k.data_ptr(),
            0 if grad_v is None else grad_v.data_ptr(),
            torch.get_num_threads(),
        )
        return None, grad_q, grad_k, grad_v, None


_apply = direct_apply(_Attention)
