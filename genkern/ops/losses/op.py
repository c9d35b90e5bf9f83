"""Adversarial losses: arguments, choice of backend, autograd, torch.library.

The kernels' contract and the formula are in csrc/losses/adversarial.h. Eager calls go through an
autograd.Function straight onto the binding; torch.compile and export see the library op
`genkern::adversarial_loss`.
"""

from functools import lru_cache

import torch
from torch import Tensor

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
from genkern.ops.losses import cuda, reference
from genkern.ops.losses.form import form_of

OP = "adversarial_loss"
BACKWARD = OP + ".backward"
KERNELS = ("cpu", "cuda", "triton")
# A loss that is linear in so few logits is torch's own dot: see `_linear_loss_of_few`.
FEW = 4096
SCALAR = {dtype: torch.empty((), dtype=result) for dtype, result in ARITHMETIC.items()}


def adversarial_loss(form, real, fake, factor=1.0, reduction="sum", stats=False):
    """The loss (0-dim), and with `stats` a tensor [4] of statistics, [4, discriminators] for lists.

    `real` and `fake` are logits, or lists of logits by discriminator whose losses `reduction` adds
    up or averages. `real` may be None. At 64 logits a call is all overhead, so the path from here
    to the kernel is kept short.
    """
    if reduction != "sum" and reduction != "mean":
        raise ValueError(f'{OP}: reduction must be "sum" or "mean", not {reduction!r}')
    compiling = torch.compiler.is_compiling()
    if form.phi == "identity" and not stats and not compiling:
        loss = _linear_loss_of_few(form, real, fake, factor)
        if loss is not None:
            return loss
    if (
        not compiling
        and is_ready(fake)
        and (real is None or (is_ready(real) and real.dtype is fake.dtype))
    ):
        if real is None:
            return _apply((form, factor, stats, 1), fake)
        if form.pairing == "paired":
            _check_pair("real", real, "fake", fake)
        return _apply((form, factor, stats, 1), real, fake)
    if isinstance(fake, (list, tuple)) or isinstance(real, (list, tuple)):
        return _of_lists(form, real, fake, factor, reduction, stats)
    check_floating(OP, **({} if real is None else {"real": real}), fake=fake)
    if form.pairing == "paired":
        _check_pair("real", real, "fake", fake)
    return _unready(form, [] if real is None else [real], [fake], factor, stats)


def _check_pair(real_name, real, fake_name, fake):
    if real.shape != fake.shape:
        raise ValueError(
            f"{OP}: {real_name} and {fake_name} go in pairs here and must have one shape, not "
            f"{tuple(real.shape)} and {tuple(fake.shape)}"
        )


def _of_lists(form, real, fake, factor, reduction, stats):
    for name, side in (("real", real), ("fake", fake)):
        if not isinstance(side, (list, tuple)) and not (name == "real" and side is None):
            raise TypeError(
                f"{OP}: {name} must be a list of logits by discriminator, like the other side, "
                f"not {type(side).__name__}"
            )
    if not fake:
        raise ValueError(f"{OP}: fake must hold the logits of at least one discriminator, not none")
    if real is not None and len(real) != len(fake):
        raise ValueError(
            f"{OP}: real and fake must hold the logits of as many discriminators, not of "
            f"{len(real)} and {len(fake)}"
        )
    reals, fakes = [] if real is None else list(real), list(fake)
    names = [
        f"{name}[{i}]" for name, x in (("real", reals), ("fake", fakes)) for i in range(len(x))
    ]
    check_floating(OP, **dict(zip(names, [*reals, *fakes], strict=True)))
    if form.pairing == "paired":
        for i, (r, f) in enumerate(zip(reals, fakes, strict=True)):
            _check_pair(f"real[{i}]", r, f"fake[{i}]", f)
    if reduction == "mean":
        factor = factor / len(fakes)
    compiling = torch.compiler.is_compiling()
    if not compiling and all(map(is_ready, reals)) and all(map(is_ready, fakes)):
        result = _apply((form, factor, stats, len(fakes)), *reals, *fakes)
    else:
        result = _unready(form, reals, fakes, factor, stats)
    return (result[0], result[1].view(4, -1)) if stats else result


def _unready(form, reals, fakes, factor, stats):
    """Logits that are not dense on the CPU: elsewhere, strided, lazy, traced, or of a subclass."""
    compiling = torch.compiler.is_compiling()
    if not compiling and all(map(is_plain, reals)) and all(map(is_plain, fakes)):
        logits = [*_dense("real", reals), *_dense("fake", fakes)]
        return _apply((form, factor, stats, len(fakes)), *logits)
    result = torch.ops.genkern.adversarial_loss(reals, fakes, *form.constants(), factor)
    return result if stats else result[0]


class _Adversarial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, *logits):
        form, factor, stats, count = ctx.call = call
        ctx.backend = backend = _choose(OP, logits)
        ctx.save_for_backward(*logits)
        ctx.gradients = ctx.totals = None
        if backend == "cpu" or (backend == "cuda" and form.pairing != "average"):
            ctx.gradients = _gradients_at_once(form, logits, ctx.needs_input_grad[1:])
        if backend == "cpu":
            loss, statistics = _forward_cpu(form, factor, stats, count, logits, ctx.gradients)
        else:
            loss, statistics, ctx.totals = _forward(
                backend, form, factor, stats, count, logits, ctx.gradients
            )
        if not stats:
            return loss
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx, grad_loss, *_):
        made = ctx.gradients
        if made is not None and not torch.is_grad_enabled():
            ctx.gradients = None  # given away once: nobody else may hold them
            if ctx.backend == "cpu":
                if grad_loss.item() == 1:
                    if backends.listeners:
                        backends.record(BACKWARD, "cpu", "computed in the forward's pass")
                    return None, *made
                made = None
        (form, factor, _, count), logits = ctx.call, ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _differentiable_backward(form, factor, count, logits, grad_loss)
            return None, *grads
        backends.record(BACKWARD, ctx.backend, "as the forward")
        needed = ctx.needs_input_grad[1:]
        call = form, factor, count, logits
        return None, *_backward(ctx.backend, *call, grad_loss, needed, ctx.totals, made)


_apply = entry(_Adversarial)


def _choose(op, logits):
    return backends.choose(op, logits[-1], KERNELS)


def _split(logits, count):
    """(reals, fakes); no reals where that side has no part."""
    return list(logits[:-count]), list(logits[-count:])


def _differentiable_backward(form, factor, count, logits, grad_loss):
    backends.record(BACKWARD, "reference", "create_graph: the kernels give one derivative")
    return differentiable_gradients(
        lambda *x: reference.adversarial_loss(form, *_split(x, count), factor),
        logits,
        (grad_loss,),
    )


def _gradients_at_once(form, logits, needed):
    """Memory for the loss's gradients, where the one pass over the logits shall give them too, else
    None. Not in fp16, where a GradScaler's grad_output is never 1: they would be of no use."""
    if form.phi == "identity" or logits[-1].dtype is torch.float16 or True not in needed:
        return None
    return _empty_gradients(logits, needed)


def _forward(backend, form, factor, stats, count, logits, gradients=None):
    """(loss, statistics or None, what a GPU's backward wants to know or None) of dense logits.
    Fills the gradients where given, for a grad_loss of 1."""
    if backend == "cpu":
        return *_forward_cpu(form, factor, stats, count, logits, gradients), None
    if backend == "triton":
        return _triton_kernels().forward(form, factor, stats, count, logits)
    if backend == "cuda":
        return cuda.forward(
            form, factor, stats, _terms(logits, count, gradients), count, logits[-1]
        )
    sides = _split(logits, count)
    loss = reference.adversarial_loss(form, *sides, factor).detach()
    return loss, reference.statistics(form, *sides).flatten() if stats else None, None


def _forward_cpu(form, factor, stats, count, logits, gradients):
    """(loss, statistics or None)"""
    dtype = logits[-1].dtype
    loss = torch.empty_like(SCALAR[dtype])
    statistics = loss.new_empty(4 * count) if stats else None
    native.adversarial_forward(
        form.native(),
        DTYPE_NUMBER[dtype],
        factor,
        _terms(logits, count, gradients),
        loss.data_ptr(),
        0 if statistics is None else statistics.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, statistics


def _triton_kernels():
    from genkern.ops.losses import triton

    return triton


def _backward(backend, form, factor, count, logits, grad_loss, needed, totals=None, made=None):
    """The gradients of the logits, None where not needed. `made`: those of CUDA's forward, for a
    grad_loss of 1, to be made right: whether they are only the device knows."""
    if form.phi == "identity":
        return _linear_gradients(form, factor, count, logits, grad_loss, needed)
    if backend == "reference":
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in logits]
            loss = reference.adversarial_loss(form, *_split(inputs, count), factor)
            return torch.autograd.grad(loss, inputs, grad_loss)
    (grad_loss,) = _dense("grad_loss", [grad_loss])
    gradients = _empty_gradients(logits, needed) if made is None else made
    if backend == "triton":
        call = form, factor, count, logits
        _triton_kernels().backward(*call, totals, grad_loss, gradients)
        return gradients
    terms = _terms(logits, count, gradients)
    if backend == "cuda":
        if form.pairing == "average" and totals is None:
            totals = _forward(backend, form, factor, False, count, logits)[2]
        cuda.backward(form, factor, terms, count, totals, grad_loss, logits[-1], made is not None)
        return gradients
    native.adversarial_backward(
        form.native(),
        DTYPE_NUMBER[logits[-1].dtype],
        factor,
        terms,
        grad_loss.data_ptr(),
        torch.get_num_threads(),
    )
    return gradients


def _linear_gradients(form, factor, count, logits, grad_loss, needed):
    """A linear loss has one gradient for all logits of a side: expanded, not filled."""
    fake_weight = form.real.weight if form.pairing == "paired" else form.fake.weight
    real_slope = factor * form.real.sign * form.real.weight
    fake_slope = factor * form.fake.sign * fake_weight

    def gradient(x, slope):
        slope = slope / x.numel() if x.numel() else 0.0
        if x.is_cpu:  # a number is cheaper than a tensor's operations, and costs no waiting here
            return x.new_full((), grad_loss.item() * slope).expand(x.shape)
        return (grad_loss * slope).to(x.dtype).expand(x.shape)

    slopes = [real_slope] * (len(logits) - count) + [fake_slope] * count
    return [
        gradient(x, slope) if wanted else None
        for x, slope, wanted in zip(logits, slopes, needed, strict=True)
    ]


# ---- Few logits, linear -------------------------------------------------------------------------


def _linear_loss_of_few(form, real, fake, factor):
    """The loss as torch's own inner products with constants, native ops with native derivatives,
    where that is faster than any call of ours: an empty autograd.Function alone takes longer. None
    where it is not."""
    if not _is_few(fake) or backends.wanted() is not None:
        return None
    if real is not None and not (_is_few(real) and real.dtype is fake.dtype):
        return None
    if backends.listeners:
        backends.record(OP, "reference", "linear in few logits: torch's own dot is the fastest")
    loss = _inner_product(fake, factor * form.fake.weight * form.fake.sign)
    if real is None:
        return loss
    return loss + _inner_product(real, factor * form.real.weight * form.real.sign)


def _is_few(logits):
    return (
        type(logits) is Tensor
        and logits.is_cpu
        and (logits.dtype is torch.float32 or logits.dtype is torch.float64)
        and 0 < logits.numel() <= FEW
    )


def _inner_product(logits, slope):
    """slope · mean of the logits"""
    if logits.dim() != 1:
        logits = logits.reshape(-1)
    return torch.dot(logits, _constants(logits.numel(), slope, logits.dtype))


@lru_cache(maxsize=64)
def _constants(count, slope, dtype):
    with torch.inference_mode(False):  # such tensors could not be saved for a backward
        return torch.full((count,), slope / count, dtype=dtype, device="cpu")


# ---- Addresses ----------------------------------------------------------------------------------


def _dense(name, tensors):
    return [materialized(OP, name, x).contiguous() for x in tensors]


def _empty_gradients(logits, needed):
    if len(logits) == 2:
        (real, fake), (need_real, need_fake) = logits, needed
        grad_real = torch.empty_like(real) if need_real else None
        return grad_real, torch.empty_like(fake) if need_fake else None
    return [
        torch.empty_like(x) if wanted else None for x, wanted in zip(logits, needed, strict=True)
    ]


def _terms(logits, count, gradients=None):
    """Six numbers a discriminator, as the contract's LogitTerm has them: addresses and counts of
    its logits, -1 for a side without a part, and the addresses of the gradients."""
    if len(logits) == 1:
        (fake,) = logits
        grad = None if gradients is None else gradients[0]
        address = 0 if grad is None else grad.data_ptr()
        return 0, fake.data_ptr(), -1, fake.numel(), 0, address
    if count == 1:
        real, fake = logits
        grad_real, grad_fake = (None, None) if gradients is None else gradients
        return (
            real.data_ptr(),
            fake.data_ptr(),
            real.numel(),
            fake.numel(),
            0 if grad_real is None else grad_real.data_ptr(),
            0 if grad_fake is None else grad_fake.data_ptr(),
        )
    addresses = [x.data_ptr() for x in logits]
    counts = [x.numel() for x in logits]
    grads = [0 if g is None else g.data_ptr() for g in gradients or [None] * len(logits)]
    if len(logits) == count:
        addresses, grads, counts = (
            [0] * count + addresses,
            [0] * count + grads,
            [-1] * count + counts,
        )
    return tuple(
        number
        for i in range(count)
        for side in (addresses, counts, grads)
        for number in (side[i], side[count + i])
    )


# ---- torch.library: what torch.compile, export and FakeTensor see -------------------------------

FORM_SCHEMA = "str phi, str pairing, float[] numbers, float factor"


@torch.library.custom_op(
    "genkern::adversarial_loss",
    mutates_args=(),
    schema=f"(Tensor[] real, Tensor[] fake, {FORM_SCHEMA}) -> (Tensor, Tensor)",
)
def _library_op(real, fake, phi, pairing, numbers, factor):
    refuse_tangents(OP, *real, *fake)
    form, count = form_of(phi, pairing, numbers), len(fake)
    logits = [*_dense("real", real), *_dense("fake", fake)]
    return _forward(_choose(OP, logits), form, factor, True, count, logits)[:2]


@_library_op.register_fake
def _(real, fake, phi, pairing, numbers, factor):
    refuse_tracing_tangents(OP)
    dtype = ARITHMETIC.get(fake[0].dtype, fake[0].dtype)
    return fake[0].new_empty((), dtype=dtype), fake[0].new_empty(4 * len(fake), dtype=dtype)


@torch.library.custom_op(
    "genkern::adversarial_loss_backward",
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor[] real, Tensor[] fake, {FORM_SCHEMA}) -> Tensor[]",
)
def _library_backward(grad_loss, real, fake, phi, pairing, numbers, factor):
    form, count = form_of(phi, pairing, numbers), len(fake)
    logits = [*_dense("real", real), *_dense("fake", fake)]
    backend = _choose(BACKWARD, logits)
    needed = [True] * len(logits)
    grads = _backward(backend, form, factor, count, logits, grad_loss, needed)
    return [grad.contiguous() for grad in grads]


@_library_backward.register_fake
def _(grad_loss, real, fake, phi, pairing, numbers, factor):
    return [x.new_empty(x.shape) for x in (*real, *fake)]


def _setup_context(ctx, inputs, output):
    real, fake, *ctx.form, ctx.factor = inputs
    ctx.save_for_backward(*real, *fake)
    ctx.count = len(fake)
    ctx.mark_non_differentiable(output[1])


def _library_autograd(ctx, grad_loss, _):
    count, logits = ctx.count, ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        form = form_of(*ctx.form)
        grads = _differentiable_backward(form, ctx.factor, count, logits, grad_loss)
    else:
        sides = _split(logits, count)
        grads = torch.ops.genkern.adversarial_loss_backward(
            grad_loss, *sides, *ctx.form, ctx.factor
        )
    return *_split(grads, count), None, None, None, None


_library_op.register_autograd(_library_autograd, setup_context=_setup_context)
