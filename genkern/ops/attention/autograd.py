"""The four primitives of attention as autograd.Functions that close under differentiation.

    Attention   backward: Backward            jvp: Jvp
    Backward    backward: Second              jvp: Second + Backward
    Second      backward, jvp: the reference
    Jvp         backward: Second, Backward    jvp: the reference

`run` says how: `run.compute` has the four primitives themselves, and `run.backward`, `second` and
`jvp` are what the formulas call, differentiable again. It is a backend's kernels (`ON`, below) or
the library ops (library.py). Every Function takes (run, settings, what is wanted, *tensors) with
the tensors q, k, v, bias, key_bias, the four of `Fixed`, then what its docstring says; only wanted
results are outputs. Cotangents that are None are zero.
"""

import torch
from torch.autograd import forward_ad

from genkern import backend as backends
from genkern.ops._autograd import direct_apply, transforms_active
from genkern.ops.attention import batching, choice, kernels, reference
from genkern.ops.attention.arguments import OP, Fixed

INPUTS, CONSTANTS = 5, 9  # the ends of the inputs and of Fixed among the tensors
_REFERENCE = "the kernels give two derivatives"


class _Launches:
    """A backend's, recorded for `explain`; the forward's record is the choice of the backend."""

    def __init__(self, backend):
        self.backend = backend

    def forward(self, *args):
        return kernels.launches(self.backend).forward(*args)

    def backward(self, *args):
        return self._follow("backward", args)

    def second(self, *args):
        return self._follow("second", args)

    def jvp(self, *args):
        return self._follow("jvp", args)

    def _follow(self, name, args):
        backend, reason = choice.following(f"{OP}.{name}", self.backend, args[0])
        backends.record(f"{OP}.{name}", backend, reason)
        return getattr(kernels.launches(backend), name)(*args)


class Kernels:
    """Eager calls, straight onto a backend's launches."""

    def __init__(self, backend):
        self.compute = _Launches(backend)

    def backward(self, *args):
        return backward(self, *args)

    def second(self, *args):
        return second(self, *args)

    def jvp(self, *args):
        return jvp(self, *args)

    @staticmethod
    def apply(function, *args):
        return function.apply(*args) if transforms_active() else direct_apply(function)(*args)


ON = {backend: Kernels(backend) for backend in choice.KERNELS}


# ---- Entries: a Function where somebody may differentiate, else the computation itself ----------


def attention(run, inputs, fixed, settings, want_lse):
    """(out, lse or None, rows)"""
    if not _is_watched(*inputs):
        return run.compute.forward(inputs, fixed, settings, want_lse)
    out, *lse, rows = run.apply(Attention, run, settings, want_lse, *inputs, *fixed)
    return out, lse[0] if want_lse else None, rows


def backward(run, inputs, fixed, settings, rows, grad_out, grad_lse, wanted):
    """The gradients of the inputs, None where not wanted."""
    wanted = possible(inputs, wanted)
    if not _is_watched(*inputs, grad_out, grad_lse):
        return run.compute.backward(inputs, fixed, settings, rows, grad_out, grad_lse, wanted)
    found = run.apply(Backward, run, settings, wanted, *inputs, *fixed, rows, grad_out, grad_lse)
    return spread(found, wanted)


def second(run, inputs, fixed, settings, rows, grad_out, grad_lse, tangents, wanted):
    """The gradients of the inputs, grad_out and grad_lse, None where not wanted."""
    wanted = (*possible(inputs, wanted[:5]), *wanted[5:])
    if not _is_watched(*inputs, grad_out, grad_lse, *tangents):
        return run.compute.second(
            inputs, fixed, settings, rows, grad_out, grad_lse, tangents, wanted
        )
    found = run.apply(
        Second, run, settings, wanted, *inputs, *fixed, rows, grad_out, grad_lse, *tangents
    )
    return spread(found, wanted)


def jvp(run, inputs, fixed, settings, rows, tangents):
    """The derivatives of out and lse."""
    if not _is_watched(*inputs, *tangents):
        return run.compute.jvp(inputs, fixed, settings, rows, tangents)
    return run.apply(Jvp, run, settings, None, *inputs, *fixed, rows, *tangents)


def _is_watched(*tensors):
    if transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def possible(inputs, wanted):
    return tuple(kernels.has_gradient(x, want) for x, want in zip(inputs, wanted, strict=True))


def spread(found, wanted):
    found = iter(found)
    return tuple(next(found) if want else None for want in wanted)


def _compact(results, wanted):
    return tuple(x for x, want in zip(results, wanted, strict=True) if want)


# ---- The Functions ------------------------------------------------------------------------------


def _keep(ctx, inputs, *outputs):
    ctx.run, ctx.settings, ctx.wanted, *tensors = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *outputs)
    ctx.save_for_forward(*tensors, *outputs)


def _kept(ctx):
    """(inputs, fixed, (rows, …)); rows as kernels read them, even where a hook on saved tensors has
    laid them out anew."""
    tensors = ctx.saved_tensors
    rows, *rest = tensors[CONSTANTS:]
    return tensors[:INPUTS], Fixed(*tensors[INPUTS:CONSTANTS]), (rows.contiguous(), *rest)


def _needed(ctx):
    """Which of the tensors need a gradient."""
    return ctx.needs_input_grad[3:]


def _is_nothing(tensors):
    return all(x is None for x in tensors)


class Attention(torch.autograd.Function):
    """(out, [lse,] rows)"""

    @staticmethod
    def forward(run, settings, wanted, *tensors):
        inputs, fixed = tensors[:INPUTS], Fixed(*tensors[INPUTS:CONSTANTS])
        out, lse, rows = run.compute.forward(inputs, fixed, settings, wanted)
        return (out, lse, rows) if wanted else (out, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, inputs, output[-1])
        ctx.mark_non_differentiable(output[-1])

    @staticmethod
    def backward(ctx, grad_out, *grad_lse):
        inputs, fixed, (rows,) = _kept(ctx)
        grad_lse = grad_lse[0] if ctx.wanted else None
        if grad_out is None and grad_lse is None:
            return (None,) * (3 + CONSTANTS)
        grads = ctx.run.backward(
            inputs, fixed, ctx.settings, rows, grad_out, grad_lse, _needed(ctx)[:INPUTS]
        )
        return None, None, None, *grads, None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        inputs, fixed, (rows,) = _kept(ctx)
        tangents = tangents[3 : 3 + INPUTS]
        out, lse = ctx.run.jvp(inputs, fixed, ctx.settings, rows, tangents)
        return (out, lse, None) if ctx.wanted else (out, None)

    @staticmethod
    def vmap(info, in_dims, run, settings, wanted, *tensors):
        fold = batching.Fold(info, in_dims[3:], tensors)
        results = Attention.apply(run, settings, wanted, *fold.tensors(""))
        return fold.results(results, "hnr" if wanted else "hr")


class Backward(torch.autograd.Function):
    """The wanted gradients. Tensors: …, rows, grad_out, grad_lse."""

    @staticmethod
    def forward(run, settings, wanted, *tensors):
        inputs, fixed = tensors[:INPUTS], Fixed(*tensors[INPUTS:CONSTANTS])
        found = run.compute.backward(inputs, fixed, settings, *tensors[CONSTANTS:], wanted)
        return _compact(found, wanted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx, *tangents):
        inputs, fixed, (rows, grad_out, grad_lse) = _kept(ctx)
        if _is_nothing(tangents):
            return (None,) * (3 + CONSTANTS + 3)
        needed = _needed(ctx)
        grads = ctx.run.second(
            inputs,
            fixed,
            ctx.settings,
            rows,
            grad_out,
            grad_lse,
            spread(tangents, ctx.wanted),
            (*needed[:INPUTS], *needed[CONSTANTS + 1 :]),
        )
        return None, None, None, *grads[:INPUTS], None, None, None, None, None, *grads[INPUTS:]

    @staticmethod
    def jvp(ctx, *tangents):
        inputs, fixed, (rows, grad_out, grad_lse) = _kept(ctx)
        tangents = tangents[3:]
        of_inputs, of_cotangents = tangents[:INPUTS], tangents[CONSTANTS + 1 :]
        parts = []
        if not _is_nothing(of_inputs):
            wanted = (*ctx.wanted, False, False)
            parts.append(
                ctx.run.second(
                    inputs,
                    fixed,
                    ctx.settings,
                    rows,
                    grad_out,
                    grad_lse,
                    of_inputs,
                    wanted,
                )[:INPUTS]
            )
        if not _is_nothing(of_cotangents):
            parts.append(
                ctx.run.backward(inputs, fixed, ctx.settings, rows, *of_cotangents, ctx.wanted)
            )
        parts = [_compact(part, ctx.wanted) for part in parts]
        return tuple(sum(x[1:], x[0]) for x in zip(*parts, strict=True))

    @staticmethod
    def vmap(info, in_dims, run, settings, wanted, *tensors):
        fold = batching.Fold(info, in_dims[3:], tensors)
        results = Backward.apply(run, settings, wanted, *fold.tensors("rhn"))
        return fold.results(results, _compact("qkvbm", wanted))


class Second(torch.autograd.Function):
    """The wanted gradients of inputs, grad_out and grad_lse. Tensors: …, rows, grad_out, grad_lse,
    five tangents."""

    @staticmethod
    def forward(run, settings, wanted, *tensors):
        inputs, fixed = tensors[:INPUTS], Fixed(*tensors[INPUTS:CONSTANTS])
        rows, grad_out, grad_lse, *tangents = tensors[CONSTANTS:]
        found = run.compute.second(
            inputs, fixed, settings, rows, grad_out, grad_lse, tangents, wanted
        )
        return _compact(found, wanted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, inputs)

    @staticmethod
    def _by_reference(ctx):
        inputs, fixed, (_, *rest) = _kept(ctx)
        settings, wanted = ctx.settings, ctx.wanted

        def function(*variables):
            inputs, cotangents = variables[:INPUTS], variables[INPUTS : INPUTS + 2]
            tangents = variables[INPUTS + 2 :]
            found = reference.second(inputs, fixed, settings, *cotangents, tangents)
            return _compact(found, wanted)

        return function, (*inputs, *rest)

    @staticmethod
    def backward(ctx, *cotangents):
        if _is_nothing(cotangents):
            return (None,) * (3 + CONSTANTS + 8)
        backends.record(OP + ".third", "reference", _REFERENCE)
        grads = reference.pullback(*Second._by_reference(ctx), cotangents)
        return None, None, None, *grads[:INPUTS], None, None, None, None, None, *grads[INPUTS:]

    @staticmethod
    def jvp(ctx, *tangents):
        backends.record(OP + ".third", "reference", _REFERENCE)
        tangents = tangents[3:]
        moving = (*tangents[:INPUTS], *tangents[CONSTANTS + 1 :])
        return reference.pushforward(*Second._by_reference(ctx), moving)

    @staticmethod
    def vmap(info, in_dims, run, settings, wanted, *tensors):
        fold = batching.Fold(info, in_dims[3:], tensors)
        results = Second.apply(run, settings, wanted, *fold.tensors("rhnqkvbm"))
        return fold.results(results, _compact("qkvbmhn", wanted))


class Jvp(torch.autograd.Function):
    """The derivatives of out and lse. Tensors: …, rows, five tangents."""

    @staticmethod
    def forward(run, settings, wanted, *tensors):
        inputs, fixed = tensors[:INPUTS], Fixed(*tensors[INPUTS:CONSTANTS])
        rows, *tangents = tensors[CONSTANTS:]
        return run.compute.jvp(inputs, fixed, settings, rows, tangents)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        inputs, fixed, (rows, *tangents) = _kept(ctx)
        if grad_out is None and grad_lse is None:
            return (None,) * (3 + CONSTANTS + 1 + INPUTS)
        needed = _needed(ctx)
        of_inputs = of_tangents = (None,) * INPUTS
        call = inputs, fixed, ctx.settings, rows, grad_out, grad_lse
        if any(needed[:INPUTS]):
            of_inputs = ctx.run.second(*call, tangents, (*needed[:INPUTS], False, False))[:INPUTS]
        if any(needed[CONSTANTS + 1 :]):
            of_tangents = ctx.run.backward(*call, needed[CONSTANTS + 1 :])
        return None, None, None, *of_inputs, None, None, None, None, None, *of_tangents

    @staticmethod
    def jvp(ctx, *tangents):
        inputs, fixed, (_, *along) = _kept(ctx)
        settings = ctx.settings
        backends.record(OP + ".jvp.jvp", "reference", _REFERENCE)

        def function(*variables):
            return reference.jvp(variables[:INPUTS], fixed, settings, variables[INPUTS:])

        tangents = tangents[3:]
        moving = (*tangents[:INPUTS], *tangents[CONSTANTS + 1 :])
        return reference.pushforward(function, (*inputs, *along), moving)

    @staticmethod
    def vmap(info, in_dims, run, settings, wanted, *tensors):
        fold = batching.Fold(info, in_dims[3:], tensors)
        results = Jvp.apply(run, settings, wanted, *fold.tensors("rqkvbm"))
        return fold.results(results, "hn")
