"""Mean differences of pairs of tensors: arguments, choice of backend, autograd, torch.library.

The kernels' contract and the formula are in csrc/differences/differences.h. Eager calls go through
an autograd.Function straight onto the binding; torch.compile and export see the library op
`genkern::differences`.
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
    is_ordinary,
    is_plain,
    materialized,
)
from genkern.ops.differences import cuda, reference

OP = "differences"
BACKWARD = OP + ".backward"
KERNELS = ("cpu", "cuda", "triton")
DISTANCE_NUMBER = {"absolute": 0, "square": 1}


def differences(names, a, b, distance, weights):
    """Σ over pairs of weight · mean φ(a - b), a 0-dim tensor; the distance φ is "absolute" or
    "square". `a` and `b` are lists of tensors, `names` how errors call them: pairs of names."""
    if not (isinstance(distance, str) and distance in DISTANCE_NUMBER):
        raise ValueError(f'{OP}: distance must be "absolute" or "square", not {distance!r}')
    a, b = list(a), list(b)
    check_floating(
        OP,
        **{
            name: x
            for pair, tensors in zip(names, zip(a, b, strict=True), strict=True)
            for name, x in zip(pair, tensors, strict=True)
        },
    )
    for (name_a, name_b), x, y in zip(names, a, b, strict=True):
        if x.shape != y.shape:
            raise ValueError(
                f"{OP}: {name_a} and {name_b} must have one shape, not {tuple(x.shape)} and "
                f"{tuple(y.shape)}"
            )
    if not torch.compiler.is_compiling() and all(map(is_plain, a)) and all(map(is_plain, b)):
        pairs = [_same_order(x, y) for x, y in zip(a, b, strict=True)]
        return _apply(distance, weights, *[x for x, _ in pairs], *[y for _, y in pairs])
    need_a, need_b = (any(x.requires_grad for x in side) for side in (a, b))
    return torch.ops.genkern.differences(a, b, distance, weights, need_a, need_b)


def _same_order(a, b):
    """The two such that their elements follow one another in the same order in memory, without a
    copy where they do already."""
    if is_ordinary(a) and is_ordinary(b):
        if a.is_contiguous() and b.is_contiguous():
            return a, b
        if a.stride() == b.stride() and torch.ops.aten.is_non_overlapping_and_dense(a):
            return a, b
    return materialized(OP, "a", a).contiguous(), materialized(OP, "b", b).contiguous()


class _Differences(torch.autograd.Function):
    @staticmethod
    def forward(ctx, distance, weights, *tensors):
        backend = backends.choose(OP, tensors[0], KERNELS)
        ctx.save_for_backward(*tensors)
        ctx.call = distance, weights, backend
        loss, ctx.gradients = _forward(
            backend, distance, weights, tensors, ctx.needs_input_grad[2:]
        )
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        (distance, weights, backend), tensors = ctx.call, ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, *_differentiable_backward(distance, weights, tensors, grad_loss)
        made, ctx.gradients = ctx.gradients, None  # given away once: nobody else may hold them
        if made is not None and backend == "cpu" and _multiply(made, grad_loss):
            if backends.listeners:
                backends.record(BACKWARD, backend, "computed in the forward's pass")
            return None, None, *made
        backends.record(BACKWARD, backend, "as the forward")
        needed = ctx.needs_input_grad[2:]
        grads = _backward(backend, distance, weights, tensors, grad_loss, needed, made)
        return None, None, *grads


_apply = entry(_Differences)


def _multiply(gradients, grad_loss):
    """Multiplies the gradients of the forward's pass, unless that would round them twice; whether
    they are ready."""
    wanted, upstream = [g for g in gradients if g is not None], grad_loss.item()
    if upstream != 1:
        if grad_loss.dtype is not wanted[0].dtype:
            return False
        torch._foreach_mul_(wanted, upstream)
    return True


def _split(tensors):
    half = len(tensors) // 2
    return list(tensors[:half]), list(tensors[half:])


def _differentiable_backward(distance, weights, tensors, grad_loss):
    backends.record(BACKWARD, "reference", "create_graph: the kernels give one derivative")
    return differentiable_gradients(
        lambda *x: reference.differences(*_split(x), distance, weights), tensors, (grad_loss,)
    )


def _forward(backend, distance, weights, tensors, needed):
    """(loss, gradients or None)

    The one pass over the tensors gives the loss's gradients too, where needed. Not in fp16, where
    they would be rounded before grad_output is known: a loss scale would come too late.
    """
    if backend == "reference":
        return reference.differences(*_split(tensors), distance, weights).detach(), None
    if backend == "triton":
        return _triton_kernels().forward(distance, weights, tensors), None
    dtype, gradients = tensors[0].dtype, None
    if dtype is not torch.float16 and True in needed:
        gradients = _empty_gradients(tensors, needed)
    pairs = _pairs(weights, tensors, gradients)
    if backend == "cuda":
        return cuda.forward(DISTANCE_NUMBER[distance], pairs, tensors[0]), gradients
    loss = tensors[0].new_empty((), dtype=ARITHMETIC[dtype])
    native.differences_forward(
        pairs,
        DISTANCE_NUMBER[distance],
        DTYPE_NUMBER[dtype],
        loss.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, gradients


def _backward(backend, distance, weights, tensors, grad_loss, needed, made=None):
    """The gradients of all tensors, None where not needed. `made`: those of the forward's pass, for
    a grad_loss of 1, of which CUDA makes the ones that are right: only the device knows whether
    they are."""
    if backend == "reference":
        with torch.enable_grad():
            inputs = [
                x.detach().requires_grad_(wanted) for x, wanted in zip(tensors, needed, strict=True)
            ]
            loss = reference.differences(*_split(inputs), distance, weights)
            grads = iter(
                torch.autograd.grad(loss, [x for x in inputs if x.requires_grad], grad_loss)
            )
        return [next(grads) if wanted else None for wanted in needed]
    if backend == "cuda" and made is not None:
        gradients = made
    else:
        made, gradients = None, _empty_gradients(tensors, needed)
    grad_loss = materialized(OP, "grad_loss", grad_loss).contiguous()
    if backend == "triton":
        _triton_kernels().backward(distance, weights, tensors, grad_loss, gradients)
        return gradients
    pairs = _pairs(weights, tensors, gradients)
    if backend == "cuda":
        number = DISTANCE_NUMBER[distance]
        cuda.backward(number, pairs, tensors[0], grad_loss, made is not None)
        return gradients
    native.differences_backward(
        pairs,
        DISTANCE_NUMBER[distance],
        DTYPE_NUMBER[tensors[0].dtype],
        grad_loss.data_ptr(),
        torch.get_num_threads(),
    )
    return gradients


def _triton_kernels():
    from genkern.ops.differences import triton

    return triton


def _empty_gradients(tensors, needed):
    return [
        torch.empty_like(x) if wanted else None for x, wanted in zip(tensors, needed, strict=True)
    ]


def _pairs(weights, tensors, gradients):
    """A tuple a pair, as the contract's DifferencePair has it."""
    a, b = _split(tensors)
    grads = _split([0 if g is None else g.data_ptr() for g in gradients or [None] * len(tensors)])
    return [
        (x.data_ptr(), y.data_ptr(), x.numel(), weight, grad_x, grad_y)
        for x, y, weight, grad_x, grad_y in zip(a, b, weights, *grads, strict=True)
    ]


# ---- torch.library: what torch.compile, export and FakeTensor see -------------------------------

CONSTANTS = "str distance, float[] weights, bool need_a, bool need_b"


@torch.library.custom_op(
    "genkern::differences",
    mutates_args=(),
    schema=f"(Tensor[] a, Tensor[] b, {CONSTANTS}) -> Tensor",
)
def _library_op(a, b, distance, weights, need_a, need_b):
    refuse_tangents(OP, *a, *b)
    backend = backends.choose(OP, a[0], KERNELS)
    return _forward(backend, distance, weights, _in_order(a, b), ())[0]


def _in_order(a, b):
    pairs = [_same_order(x, y) for x, y in zip(a, b, strict=True)]
    return *[x for x, _ in pairs], *[y for _, y in pairs]


@_library_op.register_fake
def _(a, b, distance, weights, need_a, need_b):
    refuse_tracing_tangents(OP)
    return a[0].new_empty((), dtype=ARITHMETIC.get(a[0].dtype, a[0].dtype))


@torch.library.custom_op(
    "genkern::differences_backward",
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor[] a, Tensor[] b, {CONSTANTS}) -> Tensor[]",
)
def _library_backward(grad_loss, a, b, distance, weights, need_a, need_b):
    backend = backends.choose(BACKWARD, a[0], KERNELS)
    needed = [need_a] * len(a) + [need_b] * len(b)
    tensors = [x.contiguous() for x in _in_order(a, b)]
    grads = _backward(backend, distance, weights, tensors, grad_loss, needed)
    return [grad for grad in grads if grad is not None]


@_library_backward.register_fake
def _(grad_loss, a, b, distance, weights, need_a, need_b):
    wanted = (*(a if need_a else ()), *(b if need_b else ()))
    return [x.new_empty(x.shape) for x in wanted]


def _setup_context(ctx, inputs, output):
    a, b, *ctx.constants = inputs
    ctx.save_for_backward(*a, *b)


def _library_autograd(ctx, grad_loss):
    tensors = ctx.saved_tensors
    distance, weights, need_a, need_b = ctx.constants
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = _differentiable_backward(distance, weights, tensors, grad_loss)
    else:
        given = iter(
            torch.ops.genkern.differences_backward(grad_loss, *_split(tensors), *ctx.constants)
        )
        half = len(tensors) // 2
        needed = [need_a] * half + [need_b] * half
        grads = [next(given) if wanted else None for wanted in needed]
    return *_split(grads), None, None, None, None


_library_op.register_autograd(_library_autograd, setup_context=_setup_context)
