"""Spectral normalization of a list of weights: arguments, backend, autograd, torch.library.

The kernels' contract is in csrc/spectral_norm/spectral_norm.h, the formulas in reference.py. Eager
calls go through an autograd.Function straight onto the kernels; torch.compile and export see the
library op `genkern::spectral_norm`, which changes nothing in place.

The backward needs Ŵ, σ and the vectors that this forward made, never W: so two forwards may come
before one backward, and an optimizer's step between forward and backward. Second derivatives are
plain torch operations on the saved outputs Ŵ and σ, which are part of the graph; σ is a
differentiable output for their sake.
"""

import math
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from genkern import backend as backends
from genkern.ops._autograd import entry, refuse_tangents, refuse_tracing_tangents
from genkern.ops._tensors import ARITHMETIC, is_plain, materialized
from genkern.ops.spectral_norm import launch, reference
from genkern.ops.spectral_norm.arguments import OP, Settings, check_arguments

KERNELS = ("cpu", "cuda", "triton")


class Normalized(NamedTuple):
    """weights: the list of Ŵ, each with its W's shape, dtype and strides. sigma: `[len(weights)]`.
    state: the new u and v of all weights, one after the other (see `split_state`). sigma and state
    are float32, float64 for float64 weights."""

    weights: list
    sigma: Tensor
    state: Tensor


def spectral_norm(
    weights,
    us,
    vs,
    dims,
    *,
    n_power_iterations=1,
    eps=1e-12,
    order="u_first",
    update=False,
    allocate=None,
):
    """Normalises all weights in one call; gives `Normalized`.

    weights: tensors of 2 or more dimensions, one dtype and device. us, vs: `[rows]` and `[cols]` of
    each, in the weights' dtype or in that of the arithmetic. dims: which dimension of each is its
    rows. n_power_iterations: a number, or one for each weight. update: also write the new vectors
    into `us` and `vs`. allocate: where memory for the weights and, later, their gradients
    comes from, by default torch.empty_like.
    """
    count = len(weights)
    if isinstance(n_power_iterations, int):
        n_power_iterations = (n_power_iterations,) * count
    settings = Settings(tuple(dims), tuple(n_power_iterations), float(eps), order)
    compiling = torch.compiler.is_compiling()
    check_arguments(weights, us, vs, settings, cached=not compiling)
    if not compiling and all(map(is_plain, chain(weights, us, vs))):
        *normalized, sigma, state = _spectral_norm(settings, us, vs, update, allocate, *weights)
        return Normalized(normalized, sigma, state)
    result = Normalized(*torch.ops.genkern.spectral_norm(weights, us, vs, *settings))
    if update:
        _write_state(result.state, us, vs)
    return result


def split_state(state, us, vs):
    """(new us, new vs) as views of `state`, for vectors as long as those of `us` and `vs`."""
    parts = state.split([x.numel() for pair in zip(us, vs, strict=True) for x in pair])
    return list(parts[0::2]), list(parts[1::2])


def _write_state(state, us, vs):
    new_us, new_vs = split_state(state, us, vs)
    with torch.no_grad():
        for old, new in zip((*us, *vs), (*new_us, *new_vs), strict=True):
            old.copy_(new)


class _SpectralNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, us, vs, update, allocate, *weights):
        backend = backends.choose(OP, weights[0], KERNELS)
        normalized, sigma, state = _forward(backend, weights, us, vs, settings, update, allocate)
        ctx.backend, ctx.settings, ctx.allocate = backend, settings, allocate
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*normalized, sigma, state)
        ctx.mark_non_differentiable(state)
        return *normalized, sigma, state

    @staticmethod
    def backward(ctx, *grads):
        *normalized, sigma, state = ctx.saved_tensors
        *grad_normalized, grad_sigma, _ = grads
        backend, reason = ctx.backend, "where the forward ran"
        if torch.is_grad_enabled():
            backend, reason = "reference", "create_graph: plain torch operations"
        elif any(map(_is_batched, grads)):
            backend, reason = "reference", "batched gradients: plain torch operations"
        backends.record(OP + ".backward", backend, reason)
        gradients = _backward(
            backend,
            (grad_normalized, grad_sigma),
            Normalized(normalized, sigma, state),
            ctx.settings.dims,
            ctx.needs_input_grad[5:],
            ctx.allocate,
        )
        return None, None, None, None, None, *gradients


_spectral_norm = entry(_SpectralNorm)


def _forward(backend, weights, us, vs, settings, update, allocate=None):
    """(list of Ŵ, σ, state)"""
    if backend == "reference":
        normalized, sigma, new_us, new_vs = reference.spectral_norm(weights, us, vs, *settings)
        state = torch.cat([x for pair in zip(new_us, new_vs, strict=True) for x in pair])
        if update:
            _write_state(state, us, vs)
        return normalized, sigma, state
    normalized, sigma, state, updated = launch.forward(
        backend, weights, us, vs, settings, update, allocate or torch.empty_like
    )
    if update and not updated:
        _write_state(state, us, vs)
    return normalized, sigma, state


def _backward(backend, cotangents, saved, dims, wanted, allocate=None):
    """A gradient for each weight; None where it is not wanted or zero."""
    if backend != "reference":
        allocate = allocate or torch.empty_like
        return launch.backward(backend, *cotangents, *saved, dims, wanted, allocate)
    grad_normalized, grad_sigma = cotangents
    normalized, sigma, state = saved
    gradients, at = [], 0
    for i, (weight, grad, dim) in enumerate(zip(normalized, grad_normalized, dims, strict=True)):
        rows = weight.shape[dim]
        cols = math.prod(weight.shape[:dim]) * math.prod(weight.shape[dim + 1 :])
        u, v = state[at : at + rows], state[at + rows : at + rows + cols]
        at += rows + cols
        gradient = None
        if wanted[i] and not (grad is None and grad_sigma is None):
            of_sigma = None if grad_sigma is None else grad_sigma[i]
            gradient = reference.gradient(grad, of_sigma, weight, sigma[i], u, v, dim)
        gradients.append(gradient)
    return gradients


def _is_batched(grad):
    """Whether torch.autograd.grad(is_grads_batched=True), of jacobians and gradcheck, gave this."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


# ---- torch.library: what torch.compile, export and FakeTensor see -------------------------------


@torch.library.custom_op(
    "genkern::spectral_norm",
    mutates_args=(),
    schema="(Tensor[] weights, Tensor[] us, Tensor[] vs, int[] dims, int[] iterations, float eps, "
    "str order) -> (Tensor[], Tensor, Tensor)",
)
def _library_op(weights, us, vs, dims, iterations, eps, order):
    refuse_tangents(OP, *weights)
    settings = Settings(tuple(dims), tuple(iterations), eps, order)
    backend = backends.choose(OP, weights[0], KERNELS)
    weights = [materialized(OP, "a weight", w) for w in weights]
    return _forward(backend, weights, us, vs, settings, update=False)


@_library_op.register_fake
def _(weights, us, vs, dims, iterations, eps, order):
    refuse_tracing_tangents(OP)
    dtype = ARITHMETIC.get(weights[0].dtype, weights[0].dtype)
    length = sum(x.shape[0] for x in (*us, *vs))
    return (
        [torch.empty_like(w) for w in weights],
        weights[0].new_empty(len(weights), dtype=dtype),
        weights[0].new_empty(length, dtype=dtype),
    )


@torch.library.custom_op(
    "genkern::spectral_norm_backward",
    mutates_args=(),
    schema="(Tensor[] grad_normalized, Tensor? grad_sigma, Tensor[] normalized, Tensor sigma, "
    "Tensor state, int[] dims) -> Tensor[]",
)
def _library_backward(grad_normalized, grad_sigma, normalized, sigma, state, dims):
    backend = backends.choose(OP + ".backward", sigma, KERNELS)
    saved = Normalized(normalized, sigma, state)
    return _backward(backend, (grad_normalized, grad_sigma), saved, dims, [True] * len(normalized))


@_library_backward.register_fake
def _(grad_normalized, grad_sigma, normalized, sigma, state, dims):
    return [torch.empty_like(w) for w in normalized]


def _setup_context(ctx, inputs, output):
    normalized, sigma, state = output
    ctx.dims = inputs[3]
    ctx.save_for_backward(*normalized, sigma, state)
    ctx.mark_non_differentiable(state)


def _library_autograd(ctx, grad_normalized, grad_sigma, _):
    *normalized, sigma, state = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        backends.record(OP + ".backward", "reference", "create_graph: plain torch operations")
        saved = Normalized(normalized, sigma, state)
        cotangents = grad_normalized, grad_sigma
        grads = _backward("reference", cotangents, saved, ctx.dims, [True] * len(normalized))
    else:
        grad_normalized = [
            torch.zeros_like(w) if g is None else g
            for g, w in zip(grad_normalized, normalized, strict=True)
        ]
        grads = torch.ops.genkern.spectral_norm_backward(
            grad_normalized, grad_sigma, normalized, sigma, state, ctx.dims
        )
    none = [None] * len(normalized)
    return grads, none, none, None, None, None, None


_library_op.register_autograd(_library_autograd, setup_context=_setup_context)
