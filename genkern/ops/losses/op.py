"""Adversarial losses: arguments, choice of backend, autograd, torch.library.

The kernels' contract and the formula are in csrc/losses/adversarial.h. Eager calls go through an
autograd.Function straight onto the binding; torch.compile and export see the library op
`genkern::adversarial_loss`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from genkern import backend as backends
from genkern._native import native
from genkern.ops._autograd import differentiable_gradients
from genkern.ops._tensors import (
    ARITHMETIC,
    DTYPE_NUMBER,
    check_floating,
    is_plain,
    materialized,
)
from genkern.ops.losses import reference

OP = "adversarial_loss"
KERNELS = ("cpu", "cuda")
PHI_NUMBER = {"softplus": 0, "relu": 1, "square": 2, "identity": 3}


class Side(NamedTuple):
    """z = sign · logit + shift, and the weight of this side's mean."""

    sign: float = 1.0
    shift: float = 0.0
    weight: float = 1.0


class Form(NamedTuple):
    """A loss: φ by name, one `Side` each for real and fake logits, and whether they go in pairs."""

    phi: str
    real: Side = Side()
    fake: Side = Side()
    paired: bool = False


def adversarial_loss(form, real, fake, stats=False):
    """The loss (0-dim), and with `stats` a tensor of four statistics. Either side may be None."""
    sides = {name: x for name, x in (("real", real), ("fake", fake)) if x is not None}
    check_floating(OP, **sides)
    if form.paired and real.shape != fake.shape:
        raise ValueError(
            f"{OP}: real and fake go in pairs here and must have one shape, not "
            f"{tuple(real.shape)} and {tuple(fake.shape)}"
        )
    if torch.compiler.is_compiling() or not all(is_plain(x) for x in sides.values()):
        loss, statistics = torch.ops.genkern.adversarial_loss(real, fake, *_flat(form))
    else:
        loss, statistics = _Adversarial.apply(form, real, fake, stats)
    return (loss, statistics) if stats else loss


class _Adversarial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, real, fake, stats):
        backend = backends.choose(OP, fake if real is None else real, KERNELS)
        _, need_real, need_fake, _ = ctx.needs_input_grad
        # In full precision the forward's pass gives the gradients too. In half precision they would
        # be rounded before grad_output is known, and a loss scale would come too late.
        ahead = backend == "cpu" and form.phi != "identity" and _element_size(real, fake) >= 4
        loss, statistics, grad_real, grad_fake = _forward(
            backend, form, real, fake, stats, ahead and need_real, ahead and need_fake
        )
        ctx.form, ctx.backend = form, backend
        ctx.save_for_backward(real, fake, grad_real, grad_fake)
        if stats:
            ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx, grad_loss, _):
        real, fake, grad_real, grad_fake = ctx.saved_tensors
        _, need_real, need_fake, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return None, *_differentiable_backward(ctx.form, real, fake, grad_loss), None
        ahead = (grad_real is not None or not need_real) and (
            grad_fake is not None or not need_fake
        )
        if ahead and grad_loss.item() == 1:
            return None, grad_real, grad_fake, None
        grads = _backward(ctx.backend, ctx.form, real, fake, grad_loss, need_real, need_fake)
        return None, *grads, None


def _element_size(real, fake):
    return (fake if real is None else real).element_size()


def _differentiable_backward(form, real, fake, grad_loss):
    backends.record(OP + ".backward", "reference", "create_graph: kernels give one derivative")
    return differentiable_gradients(
        lambda r, f: reference.adversarial_loss(form, r, f), (real, fake), (grad_loss,)
    )


def _forward(backend, form, real, fake, stats, want_grad_real=False, want_grad_fake=False):
    """(loss, statistics or None, grad_real or None, grad_fake or None), the gradients those of
    the loss itself."""
    if backend == "reference":
        loss = reference.adversarial_loss(form, real, fake).detach()
        return loss, reference.statistics(real, fake) if stats else None, None, None
    real, fake = _dense("real", real), _dense("fake", fake)
    one = fake if real is None else real
    loss = one.new_empty((), dtype=ARITHMETIC[one.dtype])
    statistics = loss.new_empty(4) if stats else None
    grad_real = torch.empty_like(real) if want_grad_real else None
    grad_fake = torch.empty_like(fake) if want_grad_fake else None
    arguments = (*_launch_arguments(form, real, fake), loss.data_ptr(), _address(statistics))
    if backend == "cpu":
        native.adversarial_forward(
            *arguments, _address(grad_real), _address(grad_fake), torch.get_num_threads()
        )
    else:
        with torch.cuda.device(one.device):
            scratch = one.new_empty(native.adversarial_cuda_scratch_bytes, dtype=torch.uint8)
            stream = torch.cuda.current_stream().cuda_stream
            native.adversarial_forward_cuda(*arguments, scratch.data_ptr(), stream)
    return loss, statistics, grad_real, grad_fake


def _backward(backend, form, real, fake, grad_loss, need_real, need_fake):
    """(grad_real or None, grad_fake or None)"""
    if form.phi == "identity":
        return _linear_gradients(form, real, fake, grad_loss, need_real, need_fake)
    if backend == "reference":
        with torch.enable_grad():
            inputs = [None if x is None else x.detach().requires_grad_() for x in (real, fake)]
            loss = reference.adversarial_loss(form, *inputs)
            present = [x for x in inputs if x is not None]
            grads = iter(torch.autograd.grad(loss, present, grad_loss))
        return tuple(None if x is None else next(grads) for x in inputs)
    real, fake = _dense("real", real), _dense("fake", fake)
    grad_loss = _dense("grad_loss", grad_loss)
    grad_real = torch.empty_like(real) if need_real else None
    grad_fake = torch.empty_like(fake) if need_fake else None
    arguments = (
        *_launch_arguments(form, real, fake),
        grad_loss.data_ptr(),
        _address(grad_real),
        _address(grad_fake),
    )
    if backend == "cpu":
        native.adversarial_backward(*arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(grad_loss.device):
            native.adversarial_backward_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    return grad_real, grad_fake


def _linear_gradients(form, real, fake, grad_loss, need_real, need_fake):
    """A linear loss has one gradient for all logits of a side: expanded, not filled."""

    def gradient(x, side, count, weight):
        one = grad_loss * (side.sign * weight / count if count else 0.0)
        return one.to(x.dtype).expand(x.shape)

    grad_real = grad_fake = None
    if need_real:
        grad_real = gradient(real, form.real, real.numel(), form.real.weight)
    if need_fake:
        weight = form.real.weight if form.paired else form.fake.weight
        grad_fake = gradient(fake, form.fake, fake.numel(), weight)
    return grad_real, grad_fake


def _dense(name, x):
    return None if x is None else materialized(OP, name, x).contiguous()


def _address(x):
    return 0 if x is None else x.data_ptr()


def _launch_arguments(form, real, fake):
    one = fake if real is None else real
    return (
        PHI_NUMBER[form.phi],
        DTYPE_NUMBER[one.dtype],
        form.paired,
        _address(real),
        -1 if real is None else real.numel(),
        *form.real,
        _address(fake),
        -1 if fake is None else fake.numel(),
        *form.fake,
    )


# ---- torch.library: what torch.compile, export and FakeTensor see -------------------------------


def _flat(form):
    return form.phi, form.paired, [*form.real, *form.fake]


def _form(phi, paired, numbers):
    return Form(phi, Side(*numbers[:3]), Side(*numbers[3:]), paired)


@torch.library.custom_op("genkern::adversarial_loss", mutates_args=())
def _library_op(
    real: Tensor | None, fake: Tensor | None, phi: str, paired: bool, numbers: list[float]
) -> tuple[Tensor, Tensor]:
    backend = backends.choose(OP, fake if real is None else real, KERNELS)
    loss, statistics, _, _ = _forward(backend, _form(phi, paired, numbers), real, fake, True)
    return loss, statistics


@_library_op.register_fake
def _(real, fake, phi, paired, numbers):
    one = fake if real is None else real
    dtype = ARITHMETIC.get(one.dtype, one.dtype)
    return one.new_empty((), dtype=dtype), one.new_empty(4, dtype=dtype)


@torch.library.custom_op("genkern::adversarial_loss_backward", mutates_args=())
def _library_backward(
    grad_loss: Tensor,
    real: Tensor | None,
    fake: Tensor | None,
    phi: str,
    paired: bool,
    numbers: list[float],
) -> list[Tensor]:
    backend = backends.choose(OP, fake if real is None else real, KERNELS)
    form = _form(phi, paired, numbers)
    grads = _backward(backend, form, real, fake, grad_loss, real is not None, fake is not None)
    return [grad.contiguous() for grad in grads if grad is not None]


@_library_backward.register_fake
def _(grad_loss, real, fake, phi, paired, numbers):
    return [x.new_empty(x.shape) for x in (real, fake) if x is not None]


def _setup_context(ctx, inputs, output):
    real, fake, *ctx.form = inputs
    ctx.save_for_backward(real, fake)
    ctx.mark_non_differentiable(output[1])


def _library_autograd(ctx, grad_loss, _):
    real, fake = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = _differentiable_backward(_form(*ctx.form), real, fake, grad_loss)
        return *grads, None, None, None
    grads = iter(torch.ops.genkern.adversarial_loss_backward(grad_loss, real, fake, *ctx.form))
    return *(None if x is None else next(grads) for x in (real, fake)), None, None, None


_library_op.register_autograd(_library_autograd, setup_context=_setup_context)
