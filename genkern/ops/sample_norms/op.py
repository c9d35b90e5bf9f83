"""Norms of samples: arguments, choice of backend, autograd, torch.library.

The kernels' contract and the formulas are in csrc/sample_norms/sample_norms.h. Eager calls go
through an autograd.Function straight onto the binding; torch.compile and export see the library op
`genkern::sample_norms`.
"""

from itertools import accumulate

import torch

from genkern import backend as backends
from genkern._native import native
from genkern.ops._autograd import (
    differentiable_gradients,
    entry,
    refuse_tangents,
    refuse_tracing_tangents,
)
from genkern.ops._tensors import (
    ARITHMETIC,
    DTYPE_NUMBER,
    check_floating,
    is_plain,
    is_ready,
    materialized,
    with_dense_samples,
)
from genkern.ops.sample_norms import cuda, reference

OP = "sample_norms"
BACKWARD = OP + ".backward"
KERNELS = ("cpu", "cuda", "triton")
FUNCTION_NUMBER = {"squares": 0, "square": 1, "distance": 2, "excess": 3, "largest": 4}


def sample_norms(groups, function, center=0.0, weight=1.0):
    """A function of the norms of samples (see `reference.sample_norms`), differentiable.

    groups: a list of groups, a group being a list of tensors [B, …] whose squares add up sample by
    sample; all of one floating dtype and device. "squares" takes one group. Returns a 0-dim tensor,
    of "squares" [B], in fp32 (fp64 for fp64).
    """
    if len(groups) == 1 and len(groups[0]) == 1 and not torch.compiler.is_compiling():
        (gradient,) = groups[0]  # the usual case, by the shortest way
        if is_ready(gradient) and gradient.numel() and gradient.dim():
            return _apply([1], function, center, weight, gradient)
    sizes = [len(group) for group in groups]
    tensors = [x for group in groups for x in group]
    _check(groups, tensors, function)
    if not torch.compiler.is_compiling() and all(is_plain(x) for x in tensors):
        tensors = [with_dense_samples(materialized(OP, "gradients", x)) for x in tensors]
        return _apply(sizes, function, center, weight, *tensors)
    return torch.ops.genkern.sample_norms(tensors, sizes, function, center, weight)[0]


def _check(groups, tensors, function):
    if not tensors or not all(groups):
        raise ValueError(f"{OP}: groups must hold at least one tensor each")
    check_floating(OP, **{f"gradients[{i}]": x for i, x in enumerate(tensors)})
    for group in groups:
        for x in group:
            if x.dim() == 0 or x.shape[0] != group[0].shape[0]:
                raise ValueError(
                    f"{OP}: gradients of one group must have one number of samples in their first "
                    f"dimension, not shapes {', '.join(str(tuple(x.shape)) for x in group)}"
                )
        if function == "largest" and group[0].shape[0] == 0:
            raise ValueError(f"{OP}: there is no largest norm of no samples")


def _grouped(tensors, sizes):
    ends = list(accumulate(sizes))
    return [list(tensors[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


class _SampleNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sizes, function, center, weight, *tensors):
        backend = backends.choose(OP, tensors[0], KERNELS)
        ctx.save_for_backward(*tensors)
        ctx.constants, ctx.backend = (sizes, function, center, weight), backend
        value, ctx.sums = _forward(backend, tensors, *ctx.constants)
        return value

    @staticmethod
    def backward(ctx, grad_value):
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _differentiable_backward(tensors, *ctx.constants, grad_value)
        else:
            backends.record(BACKWARD, ctx.backend, "as the forward")
            wanted = ctx.needs_input_grad[4:]
            grads = _backward(ctx.backend, tensors, *ctx.constants, ctx.sums, grad_value, wanted)
        return None, None, None, None, *grads


_apply = entry(_SampleNorms)


def _differentiable_backward(tensors, sizes, function, center, weight, grad_value):
    backends.record(BACKWARD, "reference", "create_graph: the kernels give one derivative")
    return differentiable_gradients(
        lambda *xs: reference.sample_norms(_grouped(xs, sizes), function, center, weight),
        tensors,
        (grad_value,),
    )


def _forward(backend, tensors, sizes, function, center, weight):
    """(value, sums of squares [samples of all groups] in fp64 or None) of tensors with dense
    samples."""
    if backend == "reference":
        groups = _grouped(tensors, sizes)
        return reference.sample_norms(groups, function, center, weight).detach(), None
    first = tensors[0]
    groups, items = _layout(tensors, sizes)
    if backend == "triton":
        call = sizes, groups, items, function, center, weight
        return _triton_kernels().forward(*call, first)
    total = sum(samples for _, samples in groups)
    sums = first.new_empty(total, dtype=torch.float64)
    shape = (total,) if function == "squares" else ()
    value = first.new_empty(shape, dtype=ARITHMETIC[first.dtype])
    items = [(*item, 0) for item in items]
    constants = _constants(function, center, weight, first)
    if backend == "cuda":
        cuda.forward(items, constants, sums, value)
        return value, sums
    native.sample_norms_forward(
        items,
        groups,
        *constants,
        sums.data_ptr(),
        value.data_ptr(),
        torch.get_num_threads(),
    )
    return value, sums


def _backward(backend, tensors, sizes, function, center, weight, sums, grad_value, wanted):
    """Gradients in the layout of their tensors; None where not wanted."""
    if backend == "reference":
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in tensors]
            groups = _grouped(inputs, sizes)
            value = reference.sample_norms(groups, function, center, weight)
        return torch.autograd.grad(value, inputs, grad_value)
    grad_value = materialized(OP, "grad_value", grad_value).contiguous()
    groups, items = _layout(tensors, sizes)
    # Samples lie dense, the batch need not: a gradient's layout has its samples side by side.
    grads = [_empty_gradient(x) if want else None for x, want in zip(tensors, wanted, strict=True)]
    if backend == "triton":
        call = sizes, groups, items, function, center, weight
        _triton_kernels().backward(*call, sums, grad_value, grads)
        return grads
    items = [
        (*item, 0 if grad is None else grad.data_ptr())
        for item, grad in zip(items, grads, strict=True)
    ]
    constants = _constants(function, center, weight, tensors[0])
    if backend == "cuda":
        cuda.backward(items, constants, sums, grad_value)
        return grads
    native.sample_norms_backward(
        items,
        groups,
        *constants,
        sums.data_ptr(),
        grad_value.data_ptr(),
        torch.get_num_threads(),
    )
    return grads


def _triton_kernels():
    from genkern.ops.sample_norms import triton

    return triton


def _empty_gradient(x):
    if x.is_contiguous():
        return torch.empty_like(x)
    sample = x.stride()[1:]
    size = x.numel() // max(1, x.shape[0])
    return x.new_empty_strided(x.shape, (max(1, size), *sample))


def _layout(tensors, sizes):
    """The contract's groups (first sum, samples) and items, without the gradients' addresses."""
    groups, items, first = [], [], 0
    for group in _grouped(tensors, sizes):
        samples = group[0].shape[0]
        groups.append((first, samples))
        for x in group:
            size = x.numel() // max(1, samples)
            items.append((x.data_ptr(), samples, size, x.stride(0), first))
        first += samples
    return groups, items


def _constants(function, center, weight, tensor):
    return FUNCTION_NUMBER[function], center, weight, DTYPE_NUMBER[tensor.dtype]


# ---- torch.library: what torch.compile, export and FakeTensor see -------------------------------

CONSTANTS = "int[] sizes, str function, float center, float weight"


@torch.library.custom_op(
    "genkern::sample_norms",
    mutates_args=(),
    schema=f"(Tensor[] gradients, {CONSTANTS}) -> (Tensor, Tensor)",
)
def _library_op(gradients, sizes, function, center, weight):
    refuse_tangents(OP, *gradients)
    backend = backends.choose(OP, gradients[0], KERNELS)
    tensors = [with_dense_samples(materialized(OP, "gradients", x)) for x in gradients]
    value, sums = _forward(backend, tensors, sizes, function, center, weight)
    if sums is None:
        sums = gradients[0].new_zeros(_total(gradients, sizes), dtype=torch.float64)
    return value, sums


def _total(gradients, sizes):
    return sum(group[0].shape[0] for group in _grouped(gradients, sizes))


@_library_op.register_fake
def _(gradients, sizes, function, center, weight):
    refuse_tracing_tangents(OP)
    first, total = gradients[0], _total(gradients, sizes)
    dtype = ARITHMETIC.get(first.dtype, first.dtype)
    shape = (total,) if function == "squares" else ()
    return first.new_empty(shape, dtype=dtype), first.new_empty(total, dtype=torch.float64)


@torch.library.custom_op(
    "genkern::sample_norms_backward",
    mutates_args=(),
    schema=f"(Tensor grad_value, Tensor[] gradients, Tensor sums, {CONSTANTS}) -> Tensor[]",
)
def _library_backward(grad_value, gradients, sums, sizes, function, center, weight):
    backend = backends.choose(BACKWARD, gradients[0], KERNELS)
    tensors = [with_dense_samples(materialized(OP, "gradients", x)) for x in gradients]
    constants = sizes, function, center, weight
    wanted = [True] * len(tensors)
    grads = _backward(backend, tensors, *constants, sums, grad_value, wanted)
    return [grad.contiguous() for grad in grads]


@_library_backward.register_fake
def _(grad_value, gradients, sums, sizes, function, center, weight):
    return [x.new_empty(x.shape) for x in gradients]


def _setup_context(ctx, inputs, output):
    gradients, *ctx.constants = inputs
    ctx.save_for_backward(output[1], *gradients)
    ctx.mark_non_differentiable(output[1])


def _library_autograd(ctx, grad_value, _):
    sums, *gradients = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = _differentiable_backward(gradients, *ctx.constants, grad_value)
    else:
        grads = torch.ops.genkern.sample_norms_backward(grad_value, gradients, sums, *ctx.constants)
    return list(grads), None, None, None, None


_library_op.register_autograd(_library_autograd, setup_context=_setup_context)
