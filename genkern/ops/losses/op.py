"""Adversarial losses: arguments, choice of backend, autograd, torch.library.

The kernels' contract and the formula are in csrc/losses/adversarial.h. Eager calls go through an
autograd.Function straight onto the binding; torch.compile and export see the library op
`genkern::adversarial_loss`.
"""

from typing import NamedTuple

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
)
from genkern.ops.losses import reference

OP = "adversarial_loss"
BACKWARD = OP + ".backward"
KERNELS = ("cpu", "cuda")
PHI_NUMBER = {"softplus": 0, "relu": 1, "square": 2, "identity": 3}


class Side(NamedTuple):
    """z = sign · logit + shift, and the weight of this side's mean."""

    sign: float = 1.0
    shift: float = 0.0
    weight: float = 1.0


class Form:
    """A loss: φ by name, one `Side` each for real and fake logits, and whether they go in pairs."""

    __slots__ = ("fake", "launch_constants", "paired", "phi", "real")

    def __init__(self, phi, real=None, fake=None, paired=False):
        self.phi, self.paired = phi, paired
        self.real, self.fake = real or Side(), fake or Side()
        self.launch_constants = (PHI_NUMBER[phi], paired, *self.real, *self.fake)


def adversarial_loss(form, real, fake, stats=False):
    """The loss (0-dim), and with `stats` a tensor of four statistics. `real` may be None.

    At 64 logits a call is all overhead, so the path from here to the kernel is kept short.
    """
    compiling = torch.compiler.is_compiling()
    ready = not compiling and is_ready(fake)
    if ready and real is not None:
        ready = is_ready(real) and real.dtype is fake.dtype
    if not ready:
        check_floating(OP, **({} if real is None else {"real": real}), fake=fake)
    if form.paired and real.shape != fake.shape:
        raise ValueError(
            f"{OP}: real and fake go in pairs here and must have one shape, not "
            f"{tuple(real.shape)} and {tuple(fake.shape)}"
        )
    if ready:
        result = _apply(form, real, fake, stats)
    elif not compiling and is_plain(fake) and (real is None or is_plain(real)):
        result = _apply(form, _dense("real", real), _dense("fake", fake), stats)
    else:
        constants = form.phi, form.paired, [*form.real, *form.fake]
        result = torch.ops.genkern.adversarial_loss(real, fake, *constants)
    return result if stats else result[0]


class _Adversarial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, real, fake, stats):
        backend = backends.choose(OP, fake, KERNELS)
        ctx.save_for_backward(real, fake)
        ctx.form, ctx.backend = form, backend
        if backend == "cpu":
            _, need_real, need_fake, _ = ctx.needs_input_grad
            loss, statistics, ctx.gradients = _forward_cpu(
                form, real, fake, stats, need_real, need_fake
            )
        else:
            loss, statistics = _forward(backend, form, real, fake, stats)
            ctx.gradients = None
        if stats:
            ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx, grad_loss, _):
        if torch.is_grad_enabled():
            return None, *_differentiable_backward(ctx.form, *ctx.saved_tensors, grad_loss), None
        gradients = ctx.gradients
        if gradients is not None:
            ctx.gradients = None  # given away once: nobody else may hold them
            if grad_loss.item() == 1:
                if backends.listeners:
                    backends.record(BACKWARD, "cpu", "computed in the forward's pass")
                return None, *gradients, None
        backends.record(BACKWARD, ctx.backend, "as the forward")
        _, need_real, need_fake, _ = ctx.needs_input_grad
        real, fake = ctx.saved_tensors
        grads = _backward(ctx.backend, ctx.form, real, fake, grad_loss, need_real, need_fake)
        return None, *grads, None


_apply = entry(_Adversarial)


def _differentiable_backward(form, real, fake, grad_loss):
    backends.record(BACKWARD, "reference", "create_graph: the kernels give one derivative")
    return differentiable_gradients(
        lambda r, f: reference.adversarial_loss(form, r, f), (real, fake), (grad_loss,)
    )


def _forward(backend, form, real, fake, stats):
    """(loss, statistics or None) of dense logits."""
    if backend == "reference":
        loss = reference.adversarial_loss(form, real, fake).detach()
        return loss, reference.statistics(real, fake) if stats else None
    if backend == "cpu":
        return _forward_cpu(form, real, fake, stats, False, False)[:2]
    with torch.cuda.device(fake.device):
        loss = fake.new_empty((), dtype=ARITHMETIC[fake.dtype])
        statistics = loss.new_empty(4) if stats else None
        scratch = fake.new_empty(native.adversarial_cuda_scratch_bytes, dtype=torch.uint8)
        native.adversarial_forward_cuda(
            *form.launch_constants,
            DTYPE_NUMBER[fake.dtype],
            *_flat(real),
            *_flat(fake),
            loss.data_ptr(),
            _address(statistics),
            scratch.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return loss, statistics


def _forward_cpu(form, real, fake, stats, need_real, need_fake):
    """(loss, statistics or None, (grad_real, grad_fake) or None)

    In full precision the one pass over the logits gives the loss's gradients too, where needed. In
    half precision they would be rounded before grad_output is known: a loss scale comes too late.
    """
    statistics = grad_real = grad_fake = gradients = None
    if fake.dtype is torch.float32 or fake.dtype is torch.float64:
        loss = fake.new_empty(())
        if form.phi != "identity" and (need_real or need_fake):
            grad_real = torch.empty_like(real) if need_real else None
            grad_fake = torch.empty_like(fake) if need_fake else None
            gradients = grad_real, grad_fake
    else:
        loss = fake.new_empty((), dtype=torch.float32)
    if stats:
        statistics = loss.new_empty(4)
    native.adversarial_forward(
        *form.launch_constants,
        DTYPE_NUMBER[fake.dtype],
        0 if real is None else real.data_ptr(),
        -1 if real is None else real.numel(),
        fake.data_ptr(),
        fake.numel(),
        loss.data_ptr(),
        0 if statistics is None else statistics.data_ptr(),
        0 if grad_real is None else grad_real.data_ptr(),
        0 if grad_fake is None else grad_fake.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, statistics, gradients


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
    grad_loss = _dense("grad_loss", grad_loss)
    grad_real = torch.empty_like(real) if need_real else None
    grad_fake = torch.empty_like(fake) if need_fake else None
    arguments = (
        *form.launch_constants,
        DTYPE_NUMBER[fake.dtype],
        *_flat(real),
        *_flat(fake),
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

    def gradient(x, sign, weight):
        slope = sign * weight / x.numel() if x.numel() else 0.0
        if x.is_cpu:  # a number is cheaper than a tensor's operations, and costs no waiting here
            return x.new_full((), grad_loss.item() * slope).expand(x.shape)
        return (grad_loss * slope).to(x.dtype).expand(x.shape)

    fake_weight = form.real.weight if form.paired else form.fake.weight
    return (
        gradient(real, form.real.sign, form.real.weight) if need_real else None,
        gradient(fake, form.fake.sign, fake_weight) if need_fake else None,
    )


def _dense(name, x):
    return None if x is None else materialized(OP, name, x).contiguous()


def _address(x):
    return 0 if x is None else x.data_ptr()


def _flat(x):
    """Address and number of logits; the contract's -1 for a side without a part."""
    return (0, -1) if x is None else (x.data_ptr(), x.numel())


# ---- torch.library: what torch.compile, export and FakeTensor see -------------------------------


def _form(phi, paired, numbers):
    return Form(phi, Side(*numbers[:3]), Side(*numbers[3:]), paired)


FORM_SCHEMA = "str phi, bool paired, float[] numbers"


@torch.library.custom_op(
    "genkern::adversarial_loss",
    mutates_args=(),
    schema=f"(Tensor? real, Tensor fake, {FORM_SCHEMA}) -> (Tensor, Tensor)",
)
def _library_op(real, fake, phi, paired, numbers):
    refuse_tangents(OP, real, fake)
    backend = backends.choose(OP, fake, KERNELS)
    form = _form(phi, paired, numbers)
    return _forward(backend, form, _dense("real", real), _dense("fake", fake), True)


@_library_op.register_fake
def _(real, fake, phi, paired, numbers):
    refuse_tracing_tangents(OP)
    dtype = ARITHMETIC.get(fake.dtype, fake.dtype)
    return fake.new_empty((), dtype=dtype), fake.new_empty(4, dtype=dtype)


@torch.library.custom_op(
    "genkern::adversarial_loss_backward",
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor? real, Tensor fake, {FORM_SCHEMA}) -> Tensor[]",
)
def _library_backward(grad_loss, real, fake, phi, paired, numbers):
    backend = backends.choose(BACKWARD, fake, KERNELS)
    form = _form(phi, paired, numbers)
    real, fake = _dense("real", real), _dense("fake", fake)
    grads = _backward(backend, form, real, fake, grad_loss, real is not None, True)
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
