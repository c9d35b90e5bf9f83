"""KL of diagonal Gaussians: arguments, choice of backend, autograd, torch.library.

The formulas are in csrc/gaussian_kl/gaussian_kl.h. Eager calls go through an autograd.Function
straight onto the binding; torch.compile and export see the library op `genkern::gaussian_kl`.
"""

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
    common_rows,
    is_plain,
    materialized,
)
from genkern.ops.gaussian_kl import cuda, reference

OP = "gaussian_kl"
BACKWARD = OP + ".backward"
KERNELS = ("cpu", "cuda", "triton")
NAMES = ("mean", "logvar", "other_mean", "other_logvar")
REDUCTIONS = ("batchmean", "sum", "mean", "none")


def gaussian_kl(mean, logvar, other_mean, other_logvar, reduction):
    """See `genkern.losses.gaussian_kl`."""
    tensors = _checked(mean, logvar, other_mean, other_logvar, reduction)
    present = [x for x in tensors if x is not None]
    if not torch.compiler.is_compiling() and all(is_plain(x) for x in present):
        named = zip(NAMES, tensors, strict=True)
        tensors = [None if x is None else materialized(OP, name, x) for name, x in named]
        return _apply(*tensors, reduction)
    return torch.ops.genkern.gaussian_kl(*tensors, reduction)


def _checked(mean, logvar, other_mean, other_logvar, reduction):
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{OP}: reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}"
        )
    if (other_mean is None) != (other_logvar is None):
        raise ValueError(f"{OP}: other_mean and other_logvar must be given both or neither")
    tensors = [mean, logvar, other_mean, other_logvar]
    pairs = zip(NAMES, tensors, strict=True)
    check_floating(OP, **{name: x for name, x in pairs if x is not None})
    if logvar.shape != mean.shape:
        raise ValueError(
            f"{OP}: logvar must have mean's shape, {tuple(mean.shape)}, not {tuple(logvar.shape)}"
        )
    for name, x in zip(NAMES[2:], tensors[2:], strict=True):
        if x is not None and x.shape != mean.shape:
            try:
                tensors[NAMES.index(name)] = x.expand(mean.shape)
            except RuntimeError:
                raise ValueError(
                    f"{OP}: {name} must have a shape that broadcasts to mean's, "
                    f"{tuple(mean.shape)}, not {tuple(x.shape)}"
                ) from None
    return tensors


class _GaussianKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, logvar, other_mean, other_logvar, reduction):
        tensors = mean, logvar, other_mean, other_logvar
        ctx.backend, ctx.reduction = backends.choose(OP, mean, KERNELS), reduction
        ctx.save_for_backward(*tensors)
        return _forward(ctx.backend, tensors, reduction)

    @staticmethod
    def backward(ctx, grad):
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_backward(tensors, ctx.reduction, grad), None
        backends.record(BACKWARD, ctx.backend, "as the forward")
        wanted = ctx.needs_input_grad[:4]
        return *_backward(ctx.backend, tensors, ctx.reduction, grad, wanted), None


_apply = entry(_GaussianKl)


def _differentiable_backward(tensors, reduction, grad):
    backends.record(BACKWARD, "reference", "create_graph: the kernels give one derivative")
    return differentiable_gradients(
        lambda *xs: reference.gaussian_kl(*xs, reduction), tensors, (grad,)
    )


def _forward(backend, tensors, reduction):
    if backend == "reference":
        return reference.gaussian_kl(*tensors, reduction).detach()
    mean, dtype = tensors[0], ARITHMETIC[tensors[0].dtype]
    if backend == "triton":
        factor = None if reduction == "none" else reference.factor(reduction, mean.shape)
        return _triton_kernels().forward(_in_one_order(tensors), factor)
    if reduction == "none":
        launch = _Launch(tensors, [dtype])
        (result,) = launch.outputs
        terms, total, factor = launch.of_outputs[0], 0, 1.0
    else:
        launch = _Launch(tensors, [])
        result = mean.new_empty((), dtype=dtype)
        terms, total, factor = NOWHERE, result.data_ptr(), reference.factor(reduction, mean.shape)
    if backend == "cuda":
        cuda.forward(launch.problem, mean, terms, total, factor)
    else:
        native.gaussian_kl_forward(*launch.problem, torch.get_num_threads(), terms, total, factor)
    return result


def _backward(backend, tensors, reduction, grad, wanted):
    if backend == "reference":
        return _reference_backward(tensors, reduction, grad, wanted)
    mean, grad = tensors[0], materialized(OP, "grad_output", grad)
    if backend == "triton":
        return _triton_backward(tensors, reduction, grad, wanted)
    dtypes = [
        mean.dtype if want and x is not None else None
        for x, want in zip(tensors, wanted, strict=True)
    ]
    if reduction == "none":
        launch = _Launch([*tensors, grad], dtypes)
        upstream, each, factor = 0, launch.of_inputs[4], 1.0
    else:
        launch = _Launch(tensors, dtypes)
        upstream, each = grad.data_ptr(), NOWHERE
        factor = reference.factor(reduction, mean.shape)
    outputs = launch.of_outputs, upstream, each, factor
    if backend == "cuda":
        cuda.backward(launch.problem, mean, *outputs)
    else:
        native.gaussian_kl_backward(*launch.problem, torch.get_num_threads(), *outputs)
    return launch.outputs


def _triton_kernels():
    from genkern.ops.gaussian_kl import triton

    return triton


def _triton_backward(tensors, reduction, grad, wanted):
    wanted = [want and x is not None for x, want in zip(tensors, wanted, strict=True)]
    if reduction == "none":
        factor = None
        *tensors, grad = _in_one_order([*tensors, grad])
    else:
        factor = reference.factor(reduction, tensors[0].shape)
        tensors = _in_one_order(tensors)
    return _triton_kernels().backward(tensors, factor, grad, wanted)


def _in_one_order(tensors):
    """With elements that follow one another in the first's order in memory, copied where they
    don't."""
    first = tensors[0]
    if not torch.ops.aten.is_non_overlapping_and_dense(first):
        first = first.contiguous()
    return [
        x if x is None or x.stride() == first.stride() else _in_order_of(first, x) for x in tensors
    ]


def _in_order_of(first, x):
    return torch.empty_like(first, dtype=x.dtype).copy_(x)


NOWHERE = 0, 0


class _Launch:
    """Inputs that lie in common rows, copied where they don't, and outputs that lie as they do:
    `dtypes` has one for each output, or None. (address, row stride) of both."""

    def __init__(self, inputs, dtypes):
        rows = self._laid_out(inputs, dtypes)
        if rows is None:
            rows = self._laid_out(_in_one_order(inputs), dtypes)
        count, size, strides = rows
        addresses = [
            NOWHERE if x is None else (x.data_ptr(), next(strides))
            for x in [*self.inputs, *self.outputs]
        ]
        self.of_inputs = addresses[: len(inputs)]
        self.of_outputs = addresses[len(inputs) :]
        number = DTYPE_NUMBER[inputs[0].dtype]
        self.problem = count, size, self.of_inputs[:4], number

    def _laid_out(self, inputs, dtypes):
        self.inputs = inputs
        self.outputs = [None if d is None else torch.empty_like(inputs[0], dtype=d) for d in dtypes]
        rows = common_rows([x for x in [*inputs, *self.outputs] if x is not None])
        return rows and (rows[0], rows[1], iter(rows[2]))


def _reference_backward(tensors, reduction, grad, wanted):
    with torch.enable_grad():
        inputs = [
            None if x is None else x.detach().requires_grad_(want)
            for x, want in zip(tensors, wanted, strict=True)
        ]
        value = reference.gaussian_kl(*inputs, reduction)
    present = [x for x in inputs if x is not None and x.requires_grad]
    grads = iter(torch.autograd.grad(value, present, grad))
    return [next(grads) if x is not None and x.requires_grad else None for x in inputs]


# ---- torch.library: what torch.compile, export and FakeTensor see -------------------------------

ARGUMENTS = "Tensor mean, Tensor logvar, Tensor? other_mean, Tensor? other_logvar, str reduction"


@torch.library.custom_op("genkern::gaussian_kl", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def _library_op(*arguments):
    *tensors, reduction = arguments
    refuse_tangents(OP, *tensors)
    result = _forward(backends.choose(OP, tensors[0], KERNELS), tensors, reduction)
    return result.contiguous()


@_library_op.register_fake
def _(mean, logvar, other_mean, other_logvar, reduction):
    refuse_tracing_tangents(OP)
    shape = mean.shape if reduction == "none" else ()
    return mean.new_empty(shape, dtype=ARITHMETIC.get(mean.dtype, mean.dtype))


@torch.library.custom_op(
    "genkern::gaussian_kl_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, {ARGUMENTS}) -> Tensor[]",
)
def _library_backward(grad_output, *arguments):
    *tensors, reduction = arguments
    backend = backends.choose(BACKWARD, tensors[0], KERNELS)
    grads = _backward(backend, tensors, reduction, grad_output, [x is not None for x in tensors])
    return [grad.contiguous() for grad in grads if grad is not None]


@_library_backward.register_fake
def _(grad_output, mean, logvar, other_mean, other_logvar, reduction):
    present = [x for x in (mean, logvar, other_mean, other_logvar) if x is not None]
    return [x.new_empty(x.shape) for x in present]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reduction = inputs
    ctx.save_for_backward(*tensors)


def _library_autograd(ctx, grad):
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return *_differentiable_backward(tensors, ctx.reduction, grad), None
    grads = iter(torch.ops.genkern.gaussian_kl_backward(grad, *tensors, ctx.reduction))
    return *(None if x is None else next(grads) for x in tensors), None


_library_op.register_autograd(_library_autograd, setup_context=_setup_context)
