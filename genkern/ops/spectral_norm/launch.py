"""From tensors to the kernels of a backend: layouts, addresses, memory for results.

The tensors are plain ones, checked by arguments.py. Which strides a weight has is seen here and
nowhere else. What a backend is given for each weight are the fields of SpectralForward and
SpectralBackward (csrc/spectral_norm/spectral_norm.h).
"""

import math
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import torch

from genkern._native import native
from genkern.ops._tensors import ARITHMETIC, DTYPE_NUMBER, is_ordinary, materialized
from genkern.ops.spectral_norm.arguments import OP, ORDER_NUMBER


class Layout(NamedTuple):
    """A weight's memory as csrc/spectral_norm/spectral_norm.h sees it."""

    outer: int
    rows: int
    inner: int
    v_leading: int


@lru_cache(maxsize=4096)
def layout_of(shape, stride, dim):
    """The layout of a weight of these strides, whose matrix has `dim` as its rows. None where it
    has gaps or overlaps, or its columns lie in an order that is not v's or its transpose."""
    # Dimensions of size 1 lie anywhere; rows of that size come first: one row.
    order = sorted((i for i, n in enumerate(shape) if n > 1), key=lambda i: -stride[i])
    if 0 in shape:
        order = [i for i, n in enumerate(shape) if n != 1]
    elif not _is_dense(shape, stride, order):
        return None
    at = order.index(dim) if dim in order else 0
    columns = [i for i in order if i != dim]
    in_order = sorted(columns)
    turn = in_order.index(columns[0]) if columns else 0
    if in_order[turn:] + in_order[:turn] != columns:
        return None
    return Layout(
        math.prod(shape[i] for i in columns[:at]),
        shape[dim],
        math.prod(shape[i] for i in columns[at:]),
        math.prod(shape[i] for i in in_order[:turn]),
    )


def _is_dense(shape, stride, order):
    expected = 1
    for i in reversed(order):
        if stride[i] != expected:
            return False
        expected *= shape[i]
    return True


def forward(backend, weights, us, vs, settings, update, allocate):
    """(list of Ŵ, σ, state, whether the vectors are updated: where their memory allows it)"""
    one = weights[0]
    length = sum([x.numel() for x in chain(us, vs)])
    state = one.new_empty(length, dtype=ARITHMETIC[one.dtype])
    sigma = state.new_empty(len(weights))
    # Vectors in place where the kernel can write them, else a copy that is written back.
    in_place = (
        update
        and all([x.is_contiguous() and not x.is_neg() for x in chain(us, vs)])
        and all([u.dtype == v.dtype for u, v in zip(us, vs, strict=True)])
    )
    items, normalized, copies = [], [], []
    at, size, at_sigma = state.data_ptr(), state.element_size(), sigma.data_ptr()
    for weight, u, v, dim, iterations in zip(
        weights, us, vs, settings.dims, settings.iterations, strict=True
    ):
        layout = layout_of(weight.shape, weight.stride(), dim)
        source = weight
        if layout is None or not is_ordinary(weight):
            source, layout = _contiguous("a weight", weight, dim)
            copies.append(source)  # alive until the kernel has run
        result = allocate(source)
        normalized.append(result)
        if not in_place:
            u, v = _dense("a vector", u), _dense("a vector", v)
            if u.dtype != v.dtype:
                u, v = u.to(state.dtype), v.to(state.dtype)
            copies += (u, v)
        at_u, at_v, at_new_v = u.data_ptr(), v.data_ptr(), at + layout.rows * size
        items.append(
            (
                source.data_ptr(),
                *layout,
                iterations,
                u.dtype == state.dtype,
                at_u,
                at_v,
                at_u if in_place else 0,
                at_v if in_place else 0,
                at,
                at_new_v,
                result.data_ptr(),
                at_sigma,
            )
        )
        at = at_new_v + v.numel() * size
        at_sigma += size
    run, _ = _kernels(backend)
    if in_place:
        torch.autograd.graph.increment_version((*us, *vs))
    run(items, one, settings.order, settings.eps)
    if copies:
        normalized = [_restore(n, w) for n, w in zip(normalized, weights, strict=True)]
    return normalized, sigma, state, in_place


def backward(
    backend, grad_normalized, grad_sigma, normalized, sigma, state, dims, wanted, allocate
):
    """A gradient for each weight that is `wanted` and has a cotangent; None for the others."""
    if grad_sigma is not None:
        grad_sigma = _dense("grad_sigma", grad_sigma)
    at, size, at_sigma = state.data_ptr(), state.element_size(), sigma.data_ptr()
    grad_sigma_offset = 0 if grad_sigma is None else grad_sigma.data_ptr() - at_sigma
    items, gradients, copies = [], [], []  # copies: alive until the kernel has run
    for weight, grad, dim, is_wanted in zip(normalized, grad_normalized, dims, wanted, strict=True):
        source, layout = weight, layout_of(weight.shape, weight.stride(), dim)
        if layout is None or not is_ordinary(weight):
            source, layout = _contiguous("normalized", weight, dim)
            copies.append(source)
        at_v = at + layout.rows * size
        gradient = None
        if is_wanted and not (grad is None and grad_sigma is None):
            if grad is not None:
                grad = _laid_out_as(source, grad)
                copies.append(grad)
            gradient = allocate(source)
            items.append(
                (
                    0 if grad is None else grad.data_ptr(),
                    source.data_ptr(),
                    *layout,
                    at,
                    at_v,
                    at_sigma,
                    0 if grad_sigma is None else at_sigma + grad_sigma_offset,
                    gradient.data_ptr(),
                )
            )
        gradients.append(gradient)
        at = at_v + layout.outer * layout.inner * size
        at_sigma += size
    if items:
        _, run = _kernels(backend)
        run(items, weight)
    return [
        None if g is None else _restore(g, w) for g, w in zip(gradients, normalized, strict=True)
    ]


def _kernels(backend):
    """(forward(items, a weight, order, eps), backward(items, a weight))"""
    if backend == "triton":
        from genkern.ops.spectral_norm.triton.backward import backward
        from genkern.ops.spectral_norm.triton.forward import forward

        return forward, backward
    if backend == "cuda":
        from genkern.ops.spectral_norm import cuda

        return cuda.forward, cuda.backward
    return _native_forward, _native_backward


def _native_forward(items, like, order, eps):
    native.spectral_norm_forward(
        items, DTYPE_NUMBER[like.dtype], ORDER_NUMBER[order], eps, torch.get_num_threads()
    )


def _native_backward(items, like):
    native.spectral_norm_backward(items, DTYPE_NUMBER[like.dtype], torch.get_num_threads())


def _contiguous(name, weight, dim):
    source = _dense(name, weight)
    return source, layout_of(source.shape, source.stride(), dim)


def _dense(name, x):
    """x as a flat array in memory."""
    if x.layout is not torch.strided:
        x = x.to_dense()
    x = materialized(OP, name, x)
    return x if x.is_contiguous() else x.contiguous()


def _laid_out_as(weight, grad):
    """`grad` with its elements in memory as those of `weight` are."""
    if grad.layout is torch.strided and grad.stride() == weight.stride() and is_ordinary(grad):
        return grad
    grad = _dense("a gradient", grad)
    return grad if weight.is_contiguous() else torch.empty_like(weight).copy_(grad)


def _restore(result, weight):
    """`result` in the strides of `weight`."""
    if result.stride() == weight.stride():
        return result
    return torch.empty_like(weight).copy_(result)
