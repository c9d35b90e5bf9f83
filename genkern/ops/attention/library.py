"""Attention in torch.library: what torch.compile, export and FakeTensor see.

The four primitives are ops. Each has a fake, a rule for vmap and an Autograd kernel, which is the
Functions of autograd.py over the ops themselves: so a compiled graph may hold a penalty. Arguments
are the inputs, those of `Fixed`, then the primitive's own, then those of `Settings`. Written out,
where `custom_op` would be shorter: that drops tangents in silence.
"""

import contextlib

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from genkern.ops._autograd import direct_apply, transforms_active
from genkern.ops.attention import arguments, autograd, batching, choice, kernels, reference
from genkern.ops.attention.arguments import OP, Fixed, Settings
from genkern.ops.attention.autograd import CONSTANTS, INPUTS

_FIRST = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_bias, Tensor? key_lengths, "
    "Tensor? q_starts, Tensor? k_starts, Tensor? seed, "
)
_LAST = (
    "float scale, float softcap, float dropout_p, SymInt left, SymInt right, bool lower_right, "
    "SymInt longest_q, SymInt longest_k"
)
_COTANGENTS = "Tensor rows, Tensor? grad_out, Tensor? grad_lse, "
_TANGENTS = "Tensor? t_q, Tensor? t_k, Tensor? t_v, Tensor? t_bias, Tensor? t_key_bias, "
_SETTINGS = len(Settings._fields)


def attention(inputs, fixed, settings):
    """(out, lse), by the library op."""
    out, lse, _ = torch.ops.genkern.attention(*inputs, *fixed, *settings)
    return out, lse


class _Ops:
    """The ops in the form of the primitives: (inputs, fixed, settings, …)."""

    @staticmethod
    def forward(inputs, fixed, settings, want_lse):
        return torch.ops.genkern.attention(*inputs, *fixed, *settings)

    @staticmethod
    def backward(inputs, fixed, settings, rows, grad_out, grad_lse, wanted):
        wanted = autograd.possible(inputs, wanted)
        found = torch.ops.genkern.attention_backward(
            *inputs, *fixed, rows, grad_out, grad_lse, wanted, *settings
        )
        return autograd.spread(found, wanted)

    @staticmethod
    def second(inputs, fixed, settings, rows, grad_out, grad_lse, tangents, wanted):
        wanted = (*autograd.possible(inputs, wanted[:INPUTS]), *wanted[INPUTS:])
        found = torch.ops.genkern.attention_second(
            *inputs, *fixed, rows, grad_out, grad_lse, *tangents, wanted, *settings
        )
        return autograd.spread(found, wanted)

    @staticmethod
    def jvp(inputs, fixed, settings, rows, tangents):
        return torch.ops.genkern.attention_jvp(*inputs, *fixed, rows, *tangents, *settings)


@contextlib.contextmanager
def _below_autograd():
    with contextlib.ExitStack() as modes:
        if transforms_active():
            # A Function switches derivatives off, which is not meant for the levels further out.
            modes.enter_context(torch.enable_grad())
            modes.enter_context(forward_ad._set_fwd_grad_enabled(True))
        modes.enter_context(torch._C._AutoDispatchBelowAutograd())
        yield


class _BelowAutograd:
    """The same, below their Autograd kernels of this level."""

    @staticmethod
    def forward(*args):
        with _below_autograd():
            return _Ops.forward(*args)

    @staticmethod
    def backward(*args):
        with _below_autograd():
            return _Ops.backward(*args)

    @staticmethod
    def second(*args):
        with _below_autograd():
            return _Ops.second(*args)

    @staticmethod
    def jvp(*args):
        with _below_autograd():
            return _Ops.jvp(*args)


class _Library(_Ops):
    """`run` of autograd.py's Functions, when they are the ops' Autograd kernels."""

    compute = _BelowAutograd

    @staticmethod
    def apply(function, *args):
        # The dispatcher has already gone through torch.func's transforms, to one level of them.
        with enable_single_level_autograd_function():
            return direct_apply(function)(*args)


def _parts(args):
    """(inputs, fixed, settings, the primitive's own)"""
    return (
        args[:INPUTS],
        Fixed(*args[INPUTS:CONSTANTS]),
        Settings(*args[-_SETTINGS:]),
        args[CONSTANTS:-_SETTINGS],
    )


def _launches(name, inputs, fixed, settings):
    """Those of the backend to take; None: the reference."""
    backend = choice.choose(name, inputs)
    if backend != "reference":
        return kernels.launches(backend)
    arguments.check_values(inputs, fixed, settings)
    return None


# ---- What the ops compute -----------------------------------------------------------------------


def _forward(*args):
    inputs, fixed, settings, _ = _parts(args)
    if launches := _launches(OP, inputs, fixed, settings):
        out, lse, rows = launches.forward(inputs, fixed, settings, True)
        return out, lse, kernels.with_out(rows, inputs[0], out)
    # What the kernels would keep too, because they may yet be asked for a derivative.
    out, lse = reference.attention(inputs, fixed, settings)
    rows = reference.softmax_rows(inputs, fixed, settings)
    out = _like_kernels(out, inputs[0])
    if kernels.rows_kept(inputs[0], out) == 2:
        return out, lse.contiguous(), rows
    wide = [x.float() if x is not None and x.is_floating_point() else x for x in inputs]
    unrounded, _ = reference.attention(wide, fixed, settings)
    return out, lse.contiguous(), kernels.with_out(rows, inputs[0], unrounded)


def _backward(*args):
    inputs, fixed, settings, (rows, grad_out, grad_lse, wanted) = _parts(args)
    if launches := _launches(OP + ".backward", inputs, fixed, settings):
        found = launches.backward(inputs, fixed, settings, rows, grad_out, grad_lse, wanted)
        return _compact(found, wanted)
    found = reference.backward(inputs, fixed, settings, grad_out, grad_lse)
    return _compact(_gradients_like_kernels(found, inputs), wanted)


def _second(*args):
    inputs, fixed, settings, (rows, grad_out, grad_lse, *tangents, wanted) = _parts(args)
    if launches := _launches(OP + ".second", inputs, fixed, settings):
        cotangents = grad_out, grad_lse
        found = launches.second(inputs, fixed, settings, rows, *cotangents, tangents, wanted)
        return _compact(found, wanted)
    found = reference.second(inputs, fixed, settings, grad_out, grad_lse, tangents)
    *grads, of_out, of_lse = found
    if of_out is not None:
        of_out = _like_kernels(of_out, inputs[0])
    if of_lse is not None:
        of_lse = of_lse.contiguous()
    return _compact((*_gradients_like_kernels(grads, inputs), of_out, of_lse), wanted)


def _jvp(*args):
    inputs, fixed, settings, (rows, *tangents) = _parts(args)
    if launches := _launches(OP + ".jvp", inputs, fixed, settings):
        return launches.jvp(inputs, fixed, settings, rows, tangents)
    out, lse = reference.jvp(inputs, fixed, settings, tangents)
    return _like_kernels(out, inputs[0]), lse.contiguous()


def _compact(found, wanted):
    return [x for x, want in zip(found, wanted, strict=True) if want]


def _like_kernels(x, like):
    return kernels.laid_out_like(like, x.shape[3]).copy_(x)


def _gradients_like_kernels(found, inputs):
    return [
        g if g is None else _like_kernels(g, x) if i < 3 else g.contiguous()
        for i, (g, x) in enumerate(zip(found, inputs, strict=True))
    ]


# ---- What their results look like ---------------------------------------------------------------


def _forward_fake(*args):
    (q, _, v, _, _), _, _, _ = _parts(args)
    out = kernels.laid_out_like(q, v.shape[3])
    return out, kernels.new_row_numbers(q), kernels.new_rows(q, kernels.rows_kept(q, v))


def _backward_fake(*args):
    inputs, _, _, (*_, wanted) = _parts(args)
    return _compact(kernels.in_dtypes_of(inputs, kernels.new_gradients(inputs, wanted)), wanted)


def _second_fake(*args):
    inputs, _, _, (_, *_, wanted) = _parts(args)
    q, _, v, _, _ = inputs
    found = _backward_fake(*args[: -_SETTINGS - 1], wanted[:INPUTS], *args[-_SETTINGS:])
    if wanted[INPUTS]:
        found.append(kernels.laid_out_like(q, v.shape[3]))
    if wanted[INPUTS + 1]:
        found.append(kernels.new_row_numbers(q))
    return found


def _jvp_fake(*args):
    (q, _, v, _, _), _, _, _ = _parts(args)
    return kernels.laid_out_like(q, v.shape[3]), kernels.new_row_numbers(q)


# ---- Derivatives and batches --------------------------------------------------------------------


def _forward_autograd(*args):
    inputs, fixed, settings, _ = _parts(args)
    return autograd.attention(_Library, inputs, fixed, settings, True)


def _backward_autograd(*args):
    inputs, fixed, settings, own = _parts(args)
    return _compact(autograd.backward(_Library, inputs, fixed, settings, *own), own[-1])


def _second_autograd(*args):
    inputs, fixed, settings, (rows, grad_out, grad_lse, *tangents, wanted) = _parts(args)
    call = inputs, fixed, settings, rows, grad_out, grad_lse, tangents, wanted
    return _compact(autograd.second(_Library, *call), wanted)


def _jvp_autograd(*args):
    inputs, fixed, settings, (rows, *tangents) = _parts(args)
    return autograd.jvp(_Library, inputs, fixed, settings, rows, tangents)


def _vmap_rule(op, own_kinds, result_kinds):
    """Kinds as in batching.py; `result_kinds`: of all results, those not wanted among them."""

    def rule(info, in_dims, *args):
        tensors = args[: CONSTANTS + len(own_kinds)]
        rest = args[len(tensors) :]
        fold = batching.Fold(info, in_dims, tensors)
        results = op(*fold.tensors(own_kinds), *rest)
        has_wanted = len(rest) > _SETTINGS
        kinds = _compact(result_kinds, rest[0]) if has_wanted else result_kinds
        results, dims = fold.results(results, kinds)
        return (list(results), list(dims)) if has_wanted else (results, dims)

    return rule


def _register(name, own, results, kinds, compute, fake, differentiable):
    torch.library.define(
        f"genkern::{name}",
        f"({_FIRST}{own}{_LAST}) -> {results}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.impl(f"genkern::{name}", "CompositeExplicitAutograd", compute)
    torch.library.impl(f"genkern::{name}", "Autograd", differentiable)
    torch.library.register_fake(f"genkern::{name}", fake)
    op = getattr(torch.ops.genkern, name)
    torch.library.register_vmap(f"genkern::{name}", _vmap_rule(op, *kinds))


_register(
    "attention",
    "",
    "(Tensor out, Tensor lse, Tensor rows)",
    ("", "hnr"),
    _forward,
    _forward_fake,
    _forward_autograd,
)
_register(
    "attention_backward",
    _COTANGENTS + "bool[] wanted, ",
    "Tensor[]",
    ("rhn", "qkvbm"),
    _backward,
    _backward_fake,
    _backward_autograd,
)
_register(
    "attention_second",
    _COTANGENTS + _TANGENTS + "bool[] wanted, ",
    "Tensor[]",
    ("rhnqkvbm", "qkvbmhn"),
    _second,
    _second_fake,
    _second_autograd,
)
_register(
    "attention_jvp",
    "Tensor rows, " + _TANGENTS,
    "(Tensor out, Tensor lse)",
    ("rqkvbm", "hn"),
    _jvp,
    _jvp_fake,
    _jvp_autograd,
)
