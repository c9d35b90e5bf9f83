"""Forward mode on the CPU by one kernel for out and its tangent, which torch's Functions can only
ask for one after the other: for torch.func.jvp, or tensors made dual by hand, where nothing else
differentiates. Anything else gets None here, and goes the way of the Functions.

One kernel is six products instead of seven and one exponential instead of two; and the levels of
torch.func are unwrapped here by hand, for which torch's Python takes ten times as long.
"""

import torch
from torch._C._functorch import TransformType, get_interpreter_stack, is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from genkern import backend as backends
from genkern.ops._autograd import transforms_active
from genkern.ops._tensors import is_plain
from genkern.ops.attention import kernels
from genkern.ops.attention.arguments import OP, Fixed

try:
    from torch._C._functorch import _unwrap_for_grad, _wrap_for_grad
    from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
except ImportError:  # none of them is public: without them torch.func goes the way of the Functions
    temporarily_pop_interpreter_stack = None

_WITH_THE_FORWARD = "one kernel with the forward"


def attention(inputs, fixed, settings, return_lse):
    """(out, lse), or None; lse may be None where it wasn't asked for."""
    if forward_ad._current_level < 0 or backends.wanted() not in (None, "cpu"):
        return None
    stack = get_interpreter_stack() if transforms_active() else ()
    if len(stack) > 1 or any(x.key() != TransformType.Jvp for x in stack) or not inputs[0].is_cpu:
        return None
    if stack and temporarily_pop_interpreter_stack is None:
        return None
    primals, tangents = zip(*(_parts(x) for x in inputs), strict=True)
    if not stack:
        found = _computed(primals, tangents, fixed, settings, return_lse)
        return found and _duals(*found)
    level = stack[0].level()
    primals, tangents, fixed = (
        _each(_unwrap_for_grad, x, level) for x in (primals, tangents, fixed)
    )
    with temporarily_pop_interpreter_stack():
        found = _computed(primals, tangents, Fixed(*fixed), settings, return_lse)
    return found and _duals(*_each(_wrap_for_grad, found, level))


def _computed(primals, tangents, fixed, settings, return_lse):
    """(out, lse, their tangents), or None."""
    if not all(_is_plain_on_cpu(x) for x in (*primals, *tangents, *fixed)):
        return None
    if all(x is None for x in tangents) or _is_watched(*primals, *tangents):
        return None
    backends.record(OP, "cpu", "the tensors' device" if backends.wanted() is None else "asked for")
    backends.record(OP + ".jvp", "cpu", _WITH_THE_FORWARD)
    return kernels.forward_and_jvp(primals, fixed, settings, tangents, return_lse)


def _duals(out, lse, of_out, of_lse):
    out = forward_ad.make_dual(out, of_out)
    return out, None if lse is None else forward_ad.make_dual(lse, of_lse)


def _each(change, tensors, level):
    return tuple(None if x is None else change(x, level) for x in tensors)


def _is_plain_on_cpu(x):
    return x is None or (is_plain(x) and x.is_cpu and not is_functorch_wrapped_tensor(x))


def _parts(x):
    """(primal, tangent)"""
    if x is None or not x.is_floating_point():
        return x, None
    return forward_ad.unpack_dual(x)


def _is_watched(*tensors):
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
