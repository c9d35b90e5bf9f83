"""Attention: arguments, choice of backend, autograd, torch.library.

The kernels' contract is in csrc/attention/attention.h, the meaning in reference.py. The kernels
see four dimensions [B, H, rows, last]; any other number of leading dimensions is viewed so. Eager
calls go through an autograd.Function straight onto the binding; torch.compile and export see the
library op `genkern::attention`.
"""

import math
from numbers import Real

import torch
from torch import Tensor

from genkern import backend as backends
from genkern._native import native
from genkern.ops._autograd import differentiable_gradients, entry, has_tangent, no_transforms
from genkern.ops._tensors import (
    ARITHMETIC,
    DTYPE_NUMBER,
    check_floating,
    is_plain,
    materialized,
)
from genkern.ops.attention import reference

OP = "attention"
KERNELS = ("cpu",)


def attention(q, k, v, *, is_causal=False, scale=None):
    """softmax(scale·q·kᵀ)·v, without the N×M matrix in memory, forward or backward.

    Args:
        q: queries, [..., N, d]; float32, float64, bfloat16 or float16, as k and v.
        k: keys, [..., M, d], with q's leading dimensions (any number of them, also none).
        v: values, [..., M, dv]; dv may differ from d.
        is_causal: query i sees only keys j ≤ i (aligned at the top left, as in PyTorch).
        scale: what the products q·k are multiplied by; default 1/√d.

    Returns [..., N, dv] in q's dtype, laid out in memory as q is (so heads that are a transposed
    view stay one). A query without keys (M = 0) gives zeros. Any strides; only a tensor whose last
    dimension isn't contiguous is copied. Half precision is computed in fp32 and rounded once;
    under autocast inputs are cast as for PyTorch's own scaled_dot_product_attention.

    Derivatives: the first by the kernels; under create_graph by plain PyTorch, with the matrix.
    torch.func's transforms and forward-mode differentiation raise NotImplementedError, except
    inside `genkern.use_backend("reference")`.

    Raises TypeError for other dtypes or kinds of arguments, ValueError for shapes that don't fit,
    each naming the argument.

    Source: Vaswani et al. 2017, eq. 1; online softmax: Milakov & Gimelshein 2018; recomputation
    in the backward: Dao et al. 2022 (FlashAttention).
    """
    q, k, v = _autocast(q, k, v)
    check_floating(OP, q=q, k=k, v=v)
    _check_shapes(q, k, v)
    scale = _checked_scale(scale, q.shape[-1])
    is_causal = bool(is_causal)
    leading = q.shape[:-2]
    if len(leading) != 2:
        q, k, v = (_four_dimensional(x) for x in (q, k, v))
    if torch.compiler.is_compiling() or not (is_plain(q) and is_plain(k) and is_plain(v)):
        out, *_ = torch.ops.genkern.attention(q, k, v, is_causal, scale)
    else:
        backend = backends.choose(OP, q, KERNELS)
        if backend == "reference":
            out = _by_reference(q, k, v, is_causal, scale)
        else:
            _refuse_transforms(q, k, v)
            out = _enter(q, k, v, is_causal, scale)
    return out if len(leading) == 2 else out.view(*leading, *out.shape[-2:])


def _check_shapes(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 2:
            raise ValueError(
                f"{OP}: {name} must have at least two dimensions, [..., rows, features], not "
                f"{tuple(x.shape)}"
            )
    for name, x in (("k", k), ("v", v)):
        if x.shape[:-2] != q.shape[:-2]:
            raise ValueError(
                f"{OP}: {name} must have q's leading dimensions, {tuple(q.shape[:-2])}, not "
                f"{tuple(x.shape[:-2])}"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{OP}: k must have as many features as q, {q.shape[-1]}, not {k.shape[-1]}"
        )
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"{OP}: v must have one row for each key, {k.shape[-2]}, not {v.shape[-2]}"
        )


def _checked_scale(scale, features):
    if scale is None:
        return 1 / math.sqrt(max(1, features))
    if not isinstance(scale, Real):
        raise TypeError(f"{OP}: scale must be a number or None, not {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"{OP}: scale must be finite, not {scale}")
    return float(scale)


def _autocast(*tensors):
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    # Autocast knows only some devices, and torch.compile of older torch can't be asked which.
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if _is_cast_by_autocast(x) else x for x in tensors)


def _is_cast_by_autocast(x):
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _four_dimensional(x):
    *leading, rows, last = x.shape
    heads = leading[-1] if leading else 1
    return x.reshape(math.prod(leading[:-1]), heads, rows, last)


def _by_reference(q, k, v, is_causal, scale):
    out = reference.attention(q, k, v, is_causal, scale)
    if out.requires_grad:
        out.register_hook(_record_reference_backward)
    return out


def _record_reference_backward(_):
    backends.record(OP + ".backward", "reference", "the forward ran there")


def _refuse_transforms(*tensors):
    """Kernels know nothing of tangents and batches that torch.func hides inside a tensor."""
    wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
    if wrapped or has_tangent(*tensors):
        raise NotImplementedError(no_transforms(OP))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, is_causal, scale):
        keep = any(ctx.needs_input_grad)
        out, wide_out, rows = _forward(q, k, v, is_causal, scale, keep)
        if keep:
            ctx.options = is_causal, scale
            ctx.save_for_backward(q, k, v, out if wide_out is None else wide_out, rows)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, wide_out, rows = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_backward(q, k, v, grad_out, *ctx.options), None, None
        backends.record(OP + ".backward", "cpu", "the forward ran there")
        wanted = ctx.needs_input_grad[:3]
        return *_backward(grad_out, q, k, v, wide_out, rows, *ctx.options, wanted), None, None


_enter = entry(_Attention)


def _differentiable_backward(q, k, v, grad_out, is_causal, scale):
    backends.record(OP + ".backward", "reference", "create_graph: kernels give one derivative")
    return differentiable_gradients(
        lambda *x: reference.attention(*x, is_causal, scale), (q, k, v), (grad_out,)
    )


# ---- The kernels --------------------------------------------------------------------------------


def _forward(q, k, v, is_causal, scale, keep=True):
    """(out [B, H, N, dv], wide_out, rows [2, B, H, N]); the last two are for `_backward`.

    wide_out: out in the arithmetic dtype; None where that is out's own, or without `keep`. rows: of
    each row the shift and the sum of `reference.softmax_rows`.
    """
    q, k, v = _readable(q=q, k=k, v=v)
    out = _laid_out_like(q, v.shape[-1])
    wide_out = _new_wide_out(q, v) if keep and ARITHMETIC[q.dtype] != q.dtype else None
    rows = _new_rows(q)
    native.attention_forward(
        *_launch_arguments(q, v, scale, is_causal, k.shape[2]),
        _heads(q),
        _heads(k),
        _heads(v),
        _heads(out),
        *_row_addresses(rows),
        _NOT_WANTED if wide_out is None else _heads(wide_out),
    )
    return out, wide_out, rows


def _backward(grad_out, q, k, v, wide_out, rows, is_causal, scale, wanted=(True, True, True)):
    """[grad_q, grad_k, grad_v], None where not wanted."""
    q, k, v, grad_out = _readable(q=q, k=k, v=v, grad_out=grad_out)
    grads = [
        _laid_out_like(x, x.shape[-1]) if want else None
        for x, want in zip((q, k, v), wanted, strict=True)
    ]
    native.attention_backward(
        *_launch_arguments(q, v, scale, is_causal, k.shape[2]),
        _heads(q),
        _heads(k),
        _heads(v),
        _heads(wide_out),
        _heads(grad_out),
        *_row_addresses(rows),
        *(_NOT_WANTED if grad is None else _heads(grad) for grad in grads),
    )
    return grads


_NOT_WANTED = (0, 0, 0, 0)


def _readable(**tensors):
    """Materialised, the last dimension contiguous."""
    for name, x in tensors.items():
        x = materialized(OP, name, x)
        yield x if x.stride(3) == 1 or x.shape[3] <= 1 else x.contiguous()


def _laid_out_like(x, last):
    """An empty [*x.shape[:3], last] whose first three dimensions lie in memory in x's order."""
    strides = x.stride()[:3]
    if any(stride == 0 and size > 1 for stride, size in zip(strides, x.shape, strict=False)):
        return x.new_empty((*x.shape[:3], last))
    order = sorted(range(3), key=lambda i: -strides[i])
    result = x.new_empty((*(x.shape[i] for i in order), last))
    return result.permute(*(order.index(i) for i in range(3)), 3)


def _new_wide_out(q, v):
    return q.new_empty((*q.shape[:3], v.shape[3]), dtype=ARITHMETIC.get(q.dtype, q.dtype))


def _new_rows(q):
    return q.new_empty((2, *q.shape[:3]), dtype=ARITHMETIC.get(q.dtype, q.dtype))


def _row_addresses(rows):
    shift, total = rows
    return shift.data_ptr(), total.data_ptr()


def _launch_arguments(q, v, scale, is_causal, keys):
    sizes = (*q.shape[:3], keys, q.shape[3], v.shape[3])
    return DTYPE_NUMBER[q.dtype], sizes, scale, is_causal, torch.get_num_threads()


def _heads(x):
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


# ---- torch.library: what torch.compile, export and FakeTensor see -------------------------------


# Written out, where `custom_op` and `register_autograd` would be shorter: those drop tangents in
# silence, and this op must refuse them.
torch.library.define(
    "genkern::attention",
    "(Tensor q, Tensor k, Tensor v, bool is_causal, float scale)"
    " -> (Tensor out, Tensor wide_out, Tensor rows)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("genkern::attention", "CompositeExplicitAutograd")
def _library_forward(q, k, v, is_causal, scale):
    if backends.choose(OP, q, KERNELS) == "cpu":
        out, wide_out, rows = _forward(q, k, v, is_causal, scale)
        return out, _nothing(q) if wide_out is None else wide_out, rows
    # Everything that the kernels would keep, because they may yet be asked for the backward.
    result = reference.attention(q, k, v, is_causal, scale, rounded=False)
    out = _laid_out_like(q, v.shape[-1]).copy_(result)
    wide_out = _nothing(q) if result.dtype == q.dtype else result.contiguous()
    return out, wide_out, reference.softmax_rows(q, k, is_causal, scale)


@torch.library.register_fake("genkern::attention")
def _(q, k, v, is_causal, scale):
    is_wide = ARITHMETIC.get(q.dtype, q.dtype) == q.dtype
    wide_out = _nothing(q) if is_wide else _new_wide_out(q, v)
    return _laid_out_like(q, v.shape[-1]), wide_out, _new_rows(q)


def _nothing(q):
    return q.new_empty(0)


@torch.library.register_vmap("genkern::attention")
def _(info, in_dims, *_):
    raise NotImplementedError(no_transforms(OP))


@torch.library.impl("genkern::attention", "Autograd")
def _library_op(q, k, v, is_causal, scale):
    if has_tangent(q, k, v):
        raise NotImplementedError(no_transforms(OP))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _LibraryAttention.apply(q, k, v, is_causal, scale)
    return _below_autograd(q, k, v, is_causal, scale)


def _below_autograd(*args):
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.genkern.attention(*args)


class _LibraryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, is_causal, scale):
        out, wide_out, rows = _below_autograd(q, k, v, is_causal, scale)
        ctx.options = is_causal, scale
        ctx.save_for_backward(q, k, v, wide_out if q.element_size() < 4 else out, rows)
        ctx.mark_non_differentiable(wide_out, rows)
        return out, wide_out, rows

    @staticmethod
    def backward(ctx, grad_out, *_):
        q, k, v, wide_out, rows = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_backward(q, k, v, grad_out, *ctx.options)
        else:
            grads = torch.ops.genkern.attention_backward(
                grad_out, q, k, v, wide_out, rows, *ctx.options
            )
        return *grads, None, None


@torch.library.custom_op(
    "genkern::attention_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor wide_out, Tensor rows, "
    "bool is_causal, float scale) -> (Tensor, Tensor, Tensor)",
)
def _library_backward(grad_out, q, k, v, wide_out, rows, is_causal, scale):
    if backends.choose(OP + ".backward", q, KERNELS) == "cpu":
        return tuple(_backward(grad_out, q, k, v, wide_out, rows, is_causal, scale))
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        result = reference.attention(*inputs, is_causal, scale)
        grads = torch.autograd.grad(result, inputs, grad_out)
    return tuple(
        _laid_out_like(x, x.shape[-1]).copy_(grad) for x, grad in zip((q, k, v), grads, strict=True)
    )


@_library_backward.register_fake
def _(grad_out, q, k, v, wide_out, rows, is_causal, scale):
    return tuple(_laid_out_like(x, x.shape[-1]) for x in (q, k, v))
