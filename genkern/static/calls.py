"""The calls that the report speaks of: what each launches, moves, and at least has to do.

A `Call` is one pass of one op. Its launches are recorded on CPU tensors, so the op's and the
launcher's own arithmetic decides grid, block and shared memory. The least bytes are every tensor
that goes in and every one that comes out, once; the least operations those of the products that the
formula needs (attention; the other ops are bound by memory).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

import genkern
from genkern import losses
from genkern.backend import use_backend
from genkern.bench.spectral_workloads import normalized
from genkern.ops.sample_norms.op import sample_norms

# Attention's products of 2·rows·keys·features operations each, by their features: (d, dv).
_PRODUCTS = {
    "forward": (1, 1),  # S = q·kᵀ, O = P·v
    "backward": (3, 2),  # S, dq, dk; dP = dO·vᵀ, dv
    "second order": (7, 5),  # S, A·kᵀ, q·Bᵀ, dS·B, W·k, dSᵀ·A, Wᵀ·q; dO·Cᵀ, dP, v', P·C, P∘T·v
    "jvp": (3, 3),  # S, A·kᵀ, q·Bᵀ; O, P·C, P∘T·v
}


class Call(NamedTuple):
    """prepare() gives (step, inputs): step() runs the pass and gives its results. dtype: of the
    inputs; operations: of the formula's products."""

    op: str
    what: str
    shape: str
    dtype: torch.dtype
    prepare: Callable
    operations: int = 0

    @property
    def name(self):
        return f"{self.op} {self.what} {self.shape} {short_dtype(self.dtype)}"

    @property
    def unit(self):
        """What of a GPU computes the operations."""
        return {torch.float32: "fp32", torch.float64: "fp64"}.get(self.dtype, "tensor")


def short_dtype(dtype):
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, "fp64")


def attention(what, dtype, B, H, N, d, M=None, dv=None):
    M, dv = M or N, dv or d

    def prepare():
        q, k, v = (
            torch.randn(shape, dtype=dtype).requires_grad_()
            for shape in ((B, H, N, d), (B, H, M, d), (B, H, M, dv))
        )
        known, tangents = [q, k, v], [torch.randn_like(x) for x in (q, k, v)]
        if what == "forward":
            return lambda: [genkern.attention(*(x.detach() for x in known))], known
        if what == "jvp":
            at = tuple(x.detach() for x in known)
            moved = [*known, *tangents]
            return lambda: torch.func.jvp(genkern.attention, at, tuple(tangents)), moved
        out = genkern.attention(q, k, v)
        cotangent = torch.randn_like(out).requires_grad_()
        if what == "backward":
            return lambda: torch.autograd.grad(out, known, cotangent), [*known, cotangent]
        grads = torch.autograd.grad(out, known, cotangent, create_graph=True)
        known.append(cotangent)
        return lambda: torch.autograd.grad(grads, known, tangents), [*known, *tangents]

    of_d, of_dv = _PRODUCTS[what]
    operations = 2 * B * H * N * M * (of_d * d + of_dv * dv)
    keys = "" if M == N and dv == d else f" M={M} dv={dv}"
    return Call("attention", what, f"{B}×{H}×{N}×{d}{keys}", dtype, prepare, operations)


def spectral_norm(what, model, dtype=torch.float32):
    def prepare():
        discriminator = normalized(model, "genkern", dtype)
        weights = [layer.parametrizations.weight.original for layer in discriminator.layers]
        vectors = [x for x in discriminator.buffers() if x.is_floating_point()]
        if what == "forward":
            return lambda: [*discriminator(), *vectors], [*weights, *vectors]
        given = discriminator()
        cotangents = [torch.randn_like(x) for x in given]
        return lambda: torch.autograd.grad(given, weights, cotangents), [*given, *cotangents]

    return Call("spectral_norm", what, model, dtype, prepare)


def _of_loss(op, what, shape, dtype, leaves, value_of):
    """The forward of a scalar, or both passes, because a forward may compute the gradients too:
    `leaves()` gives tensors, `value_of` them a loss."""

    def prepare():
        known = leaves()
        if what == "forward":
            return lambda: [value_of([x.detach() for x in known])], known
        for x in known:
            x.requires_grad_()

        def step():
            value = value_of(known)
            return value.detach(), *torch.autograd.grad(value, known)

        return step, known

    return Call(op, what, shape, dtype, prepare)


def hinge(what, discriminators, count, dtype=torch.float32):
    def leaves():
        return [torch.randn(count, dtype=dtype) for _ in range(2 * discriminators)]

    def value(x):
        return losses.hinge.d(x[:discriminators], x[discriminators:])

    shape = f"hinge D {discriminators}×{count}"
    return _of_loss("losses", what, shape, dtype, leaves, value)


def feature_matching(what, maps, count, dtype=torch.float32):
    def leaves():
        return [torch.randn(count, dtype=dtype) for _ in range(2 * maps)]

    def value(x):
        return losses.feature_matching([x[:maps]], [x[maps:]], detach_real=False)

    shape = f"feature matching {maps}×{count}"
    return _of_loss("differences", what, shape, dtype, leaves, value)


def penalty(what, samples, size, dtype=torch.float32):
    def leaves():
        return [torch.randn(samples, size, dtype=dtype)]

    def value(x):
        return sample_norms([x], "square", 1.0, 10.0)

    return _of_loss("sample_norms", what, f"R1 {samples}×{size}", dtype, leaves, value)


def kl(what, *shape, dtype=torch.float32):
    def leaves():
        return [torch.randn(shape, dtype=dtype) for _ in range(2)]

    name = "×".join(str(n) for n in shape)
    return _of_loss("gaussian_kl", what, name, dtype, leaves, lambda x: losses.gaussian_kl(*x))


def all_calls():
    """In a model's sizes: launches, occupancy, lower bounds."""
    half, single = torch.bfloat16, torch.float32
    passes = list(_PRODUCTS)
    shapes = [(8, 64), (8, 128)]
    calls = [attention(p, half, 1, H, 4096, d) for H, d in shapes for p in passes]
    calls += [attention(p, half, 4, 1, 4096, 24, M=1024, dv=96) for p in passes]
    calls += [attention(p, torch.float16, 1, 8, 4096, 64) for p in passes[:2]]
    calls += [attention(p, half, 1, 4, 4096, 256) for p in passes[:2]]
    calls += [attention(p, single, 1, 8, 4096, 64) for p in passes]
    for what in ("forward", "backward"):
        calls += [spectral_norm(what, name) for name in ("SNGAN-32", "DCGAN-64")]
    for what in ("forward", "both passes"):
        calls += [hinge(what, 5, 4096), hinge(what, 1, 262144, half)]
        calls += [feature_matching(what, 54, 65536), penalty(what, 64, 12288)]
        calls.append(kl(what, 16, 8, 64, 64))
    return calls


def small_calls():
    """In sizes that the executor takes in seconds: the bytes that the kernels really move."""
    half, single = torch.bfloat16, torch.float32
    calls = [attention(p, half, 1, 1, 512, 64) for p in _PRODUCTS]
    calls += [attention(p, single, 1, 1, 256, 64) for p in _PRODUCTS]
    calls += [spectral_norm(what, "SNGAN-32") for what in ("forward", "backward")]
    for what in ("forward", "both passes"):
        calls += [hinge(what, 5, 32768), feature_matching(what, 6, 65536)]
        calls += [penalty(what, 16, 12288), kl(what, 4, 8, 64, 64)]
    return calls


def step_under(backend, call, taking):
    """Runs a call's step on a backend and gives what `taking()`, a context manager, collected of
    its launches; and the tensors that the step read and gave."""
    with use_backend(backend):
        with taking():
            step, inputs = call.prepare()
        with taking() as launches:
            results = step()
    return list(launches), inputs, list(results)


def least_bytes(inputs, results):
    """Every tensor once; one that is both is read and written."""
    return sum(x.numel() * x.element_size() for x in [*inputs, *results])
