"""Cross-entropy of a linear layer without its logits: arguments, choice of backend, autograd,
torch.library.

The formula and what the kernel does are in csrc/linear_cross_entropy/linear_cross_entropy.h, the
chunks in chunks.py. Eager calls go through an autograd.Function; torch.compile and export see the
library op `genkern::linear_cross_entropy`.
"""

from typing import NamedTuple

import torch

from genkern import backend as backends
from genkern.ops._autograd import (
    differentiable_gradients,
    entry,
    refuse_tangents,
    refuse_tracing_tangents,
)
from genkern.ops._tensors import ARITHMETIC, check_floating, is_plain, materialized
from genkern.ops.linear_cross_entropy import chunks, reference

OP = "linear_cross_entropy"
BACKWARD = OP + ".backward"
KERNELS = ("cpu",)


class Options(NamedTuple):
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0  # 0: none
    z_loss: float = 0.0
    reduction: str = "mean"


def linear_cross_entropy(input, weight, bias, target, options):
    """See `genkern.losses.linear_cross_entropy`."""
    _check(input, weight, bias, target, options)
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    shape = target.shape
    input, target = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    present = [x for x in (input, weight, bias) if x is not None]
    if not torch.compiler.is_compiling() and all(is_plain(x) for x in present):
        _check_range(target, weight.shape[0], options)
        input = materialized(OP, "input", input)
        weight = materialized(OP, "linear_weight", weight)
        bias = None if bias is None else materialized(OP, "linear_bias", bias)
        loss = _apply(input, weight, bias, target.contiguous(), options)
    else:
        loss = torch.ops.genkern.linear_cross_entropy(input, weight, bias, target, *options)
    return loss.reshape(shape) if options.reduction == "none" else loss


def _check(input, weight, bias, target, options):
    tensors = {"input": input, "linear_weight": weight}
    check_floating(OP, **tensors, **({} if bias is None else {"linear_bias": bias}))
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{OP}: input [*, d] and linear_weight [V, d] must have one d, not shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{OP}: linear_bias must have the shape ({weight.shape[0]},), not {tuple(bias.shape)}"
        )
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        what = target.dtype if isinstance(target, torch.Tensor) else type(target).__name__
        raise TypeError(f"{OP}: target must be a tensor of torch.int64, class indices, not {what}")
    if target.shape != input.shape[:-1] or target.device != input.device:
        raise ValueError(
            f"{OP}: target must have input's shape without its last dimension, "
            f"{tuple(input.shape[:-1])}, and its device, {input.device}, not "
            f"{tuple(target.shape)} and {target.device}"
        )
    if options.reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"{OP}: reduction must be 'mean', 'sum' or 'none', not {options.reduction!r}"
        )
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing must be in [0, 1], not {options.label_smoothing}")
    if not options.softcap >= 0:
        raise ValueError(f"{OP}: softcap must be positive or None, not {options.softcap}")


def _check_range(target, classes, options):
    if not target.is_cpu or target.numel() == 0:
        return  # a device's kernels assert it themselves: asking here would wait
    wrong = ((target < 0) | (target >= classes)) & (target != options.ignore_index)
    if wrong.any():
        raise IndexError(
            f"{OP}: target must hold ignore_index, {options.ignore_index}, or classes in "
            f"[0, {classes}), not {target[wrong][0].item()}"
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, target, options):
        ctx.backend = backends.choose(OP, input, KERNELS)
        ctx.save_for_backward(input, weight, bias, target)
        ctx.options, ctx.gradients = options, None
        if ctx.backend == "reference":
            return reference.linear_cross_entropy(input, weight, bias, target, options).detach()
        wanted = ctx.needs_input_grad[:3]
        if options.reduction == "none" or not any(wanted):
            return chunks.forward(input, weight, bias, target, options)
        loss, ctx.gradients = chunks.forward_with_gradients(
            input, weight, bias, target, options, wanted
        )
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        input, weight, bias, target = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _differentiable_backward(input, weight, bias, target, ctx.options, grad_loss)
            return *grads, None, None
        gradients, ctx.gradients = ctx.gradients, None  # given away once
        if gradients is not None:
            backends.record(BACKWARD, ctx.backend, "computed in the forward's pass")
            return *chunks.scaled(gradients, grad_loss, input.dtype), None, None
        backends.record(BACKWARD, ctx.backend, "as the forward")
        wanted = ctx.needs_input_grad[:3]
        grads = _backward(ctx.backend, input, weight, bias, target, ctx.options, grad_loss, wanted)
        return *grads, None, None


_apply = entry(_LinearCrossEntropy)


def _differentiable_backward(input, weight, bias, target, options, grad_loss):
    backends.record(BACKWARD, "reference", "create_graph: the kernels give one derivative")
    return differentiable_gradients(
        lambda x, w, b: reference.linear_cross_entropy(x, w, b, target, options),
        (input, weight, bias),
        (grad_loss,),
    )


def _backward(backend, input, weight, bias, target, options, grad_loss, wanted):
    if backend != "reference":
        return chunks.backward(input, weight, bias, target, options, grad_loss, wanted)
    with torch.enable_grad():
        inputs = [
            None if x is None else x.detach().requires_grad_(want)
            for x, want in zip((input, weight, bias), wanted, strict=True)
        ]
        loss = reference.linear_cross_entropy(*inputs, target, options)
    present = [x for x in inputs if x is not None and x.requires_grad]
    grads = iter(torch.autograd.grad(loss, present, grad_loss))
    return [next(grads) if x is not None and x.requires_grad else None for x in inputs]


# ---- torch.library: what torch.compile, export and FakeTensor see -------------------------------

ARGUMENTS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
    "float label_smoothing, float softcap, float z_loss, str reduction"
)


@torch.library.custom_op(
    "genkern::linear_cross_entropy", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor"
)
def _library_op(input, weight, bias, target, *options):
    refuse_tangents(OP, input, weight, bias)
    options = Options(*options)
    _check_range(target, weight.shape[0], options)
    if backends.choose(OP, input, KERNELS) == "reference":
        return reference.linear_cross_entropy(input, weight, bias, target, options)
    return chunks.forward(input, weight, bias, target.contiguous(), options)


@_library_op.register_fake
def _(input, weight, bias, target, *options):
    refuse_tracing_tangents(OP)
    shape = target.shape if Options(*options).reduction == "none" else ()
    return input.new_empty(shape, dtype=ARITHMETIC.get(input.dtype, input.dtype))


@torch.library.custom_op(
    "genkern::linear_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor grad_loss, {ARGUMENTS}) -> Tensor[]",
)
def _library_backward(grad_loss, input, weight, bias, target, *options):
    backend = backends.choose(BACKWARD, input, KERNELS)
    wanted = True, True, bias is not None
    grads = _backward(
        backend, input, weight, bias, target.contiguous(), Options(*options), grad_loss, wanted
    )
    return [grad for grad in grads if grad is not None]


@_library_backward.register_fake
def _(grad_loss, input, weight, bias, target, *options):
    return [torch.empty_like(x) for x in (input, weight, bias) if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.options = *inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors)


def _library_autograd(ctx, grad_loss):
    input, weight, bias, target = ctx.saved_tensors
    nothing = [None] * (1 + len(ctx.options))
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        options = Options(*ctx.options)
        grads = _differentiable_backward(input, weight, bias, target, options, grad_loss)
        return *grads, *nothing
    grads = iter(
        torch.ops.genkern.linear_cross_entropy_backward(
            grad_loss, input, weight, bias, target, *ctx.options
        )
    )
    return *(None if x is None else next(grads) for x in (input, weight, bias)), *nothing


_library_op.register_autograd(_library_autograd, setup_context=_setup_context)
