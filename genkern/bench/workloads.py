"""What is measured: each workload is one forward and backward, or a derivative of another kind,
prepared once per implementation.

`Workload.prepare(name)` gives a function without arguments that runs it and returns outputs and
gradients. "eager" is what people write today, "compile" the same through
torch.compile, "sdpa" PyTorch's fused attention, "genkern" ours, "exact" eager in fp64. All get the
same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import genkern


@dataclass(frozen=True)
class Workload:
    """`build(implementation, dtype)` returns the step; `others` are implementations beside eager
    and genkern; `quick` puts it in `--quick`, "compiled" with torch.compile too (a discriminator's
    normalizations take it too long). The error may be `error_ratio` times eager's."""

    op: str
    shape: str
    dtype: torch.dtype
    build: Callable
    others: tuple[str, ...] = ("compile",)
    quick: bool | str = False
    error_ratio: float = 1.25

    @property
    def name(self):
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def implementations(self):
        return ("eager", *self.others, "genkern")

    def prepare(self, implementation):
        torch.manual_seed(0)
        if implementation == "exact":
            return self.build("eager", torch.float64)
        return self.build(implementation, self.dtype)


def _numbers(*shape, dtype, grad=True):
    """Random values that every dtype gets alike: drawn in fp32, rounded to bf16's grid."""
    return torch.randn(shape).bfloat16().to(dtype).requires_grad_(grad)


def _compiled(function, implementation):
    if implementation != "compile":
        return function
    torch._dynamo.reset()  # it compiles one function for only so many workloads
    return torch.compile(function)


# ---- Attention ----------------------------------------------------------------------------------


def eager_attention(q, k, v, is_causal=False):
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if is_causal:
        blocked = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(blocked, float("-inf"))
    return scores.softmax(-1) @ v


def attention(
    B,
    H,
    N,
    d,
    M=None,
    dv=None,
    is_causal=False,
    dtype=torch.float32,
    derivative="backward",
    quick=False,
):
    """`derivative`: "backward": forward and backward; "second order": a gradient penalty's step,
    the gradients of ⟨the gradients, random tangents⟩ after forward and backward; "jvp": the output
    and its tangent, in forward mode."""
    M, dv = M or N, dv or d

    def build(implementation, dtype):
        q = _numbers(B, H, N, d, dtype=dtype)
        k = _numbers(B, H, M, d, dtype=dtype)
        v = _numbers(B, H, M, dv, dtype=dtype)
        cotangent = _numbers(B, H, N, dv, dtype=dtype, grad=derivative == "second order")
        tangents = tuple(_numbers(*x.shape, dtype=dtype, grad=False) for x in (q, k, v))
        function = {"genkern": genkern.attention, "sdpa": F.scaled_dot_product_attention}.get(
            implementation, eager_attention
        )
        function = _compiled(partial(function, is_causal=is_causal), implementation)

        def backward():
            out = function(q, k, v)
            return out, *torch.autograd.grad(out, (q, k, v), cotangent)

        def second_order():
            grads = torch.autograd.grad(function(q, k, v), (q, k, v), cotangent, create_graph=True)
            return torch.autograd.grad(grads, (q, k, v, cotangent), tangents)

        def jvp():
            return torch.func.jvp(function, tuple(x.detach() for x in (q, k, v)), tangents)

        return {"backward": backward, "second order": second_order, "jvp": jvp}[derivative]

    keys = "" if M == N and dv == d else f" M={M} dv={dv}"
    shape = f"{B}×{H}×{N}×{d}{keys}{' causal' if is_causal else ''}"
    if derivative == "backward":
        return Workload("attention", shape, dtype, build, ("compile", "sdpa"), quick)
    return Workload(f"attention {derivative}", shape, dtype, build, (), quick, error_ratio=2.0)


def attentions():
    """The shapes of a transformer, of a long sequence, of small heads, and of SAGAN's block."""
    quick = {(1, 4, 1024, 64): "compiled", (1, 1, 4096, 64): True, (8, 1, 1024, 24): True}
    for dtype in (torch.float32, torch.bfloat16):
        for derivative in ("backward", "second order", "jvp"):
            for B, H, N, d, options in (
                (1, 4, 1024, 64, {}),
                (1, 4, 1024, 64, {"is_causal": True}),
                (1, 1, 4096, 64, {}),
                (4, 8, 256, 64, {"is_causal": True}),
                (8, 1, 1024, 24, {"M": 256, "dv": 96}),
            ):
                in_quick = dtype == torch.float32 and not options.get("is_causal")
                yield attention(
                    *(B, H, N, d),
                    **options,
                    dtype=dtype,
                    derivative=derivative,
                    quick=in_quick and quick[B, H, N, d],
                )


# ---- Spectral normalization ---------------------------------------------------------------------

# Weights as torch's modules lay them out: (rows, cols) of the matrix.
DISCRIMINATORS = {
    "SNGAN-32": [(128, 27), (128, 1152), (128, 27), *[(128, 1152)] * 6, (1, 128)],
    "DCGAN-64": [(128, 48), (256, 2048), (512, 4096), (1024, 8192), (1, 16384)],
    "HiFi-GAN MSD": [
        (128, 15),
        (128, 1312),
        (256, 328),
        (512, 656),
        (1024, 1312),
        (1024, 2624),
        (1024, 5120),
        (1, 3072),
    ],
}


class Weights(nn.Module):
    """Layers that do nothing but own a weight: the normalization alone is measured."""

    def __init__(self, shapes, dtype):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(cols, rows, bias=False, dtype=dtype) for rows, cols in shapes
        )
        for layer in self.layers:
            layer.weight.data = layer.weight.data.bfloat16().to(dtype)

    def forward(self):
        return [layer.weight for layer in self.layers]


def spectral_norm(model, quick=False):
    def build(implementation, dtype):
        weights = Weights(DISCRIMINATORS[model], torch.float32)
        if implementation == "genkern":
            normalized = genkern.spectral_norm(weights, recurse=True)
        else:
            for layer in weights.layers:
                nn.utils.parametrizations.spectral_norm(layer)
            normalized = weights
        normalized.to(dtype)
        cotangents = [
            _numbers(rows, cols, dtype=dtype, grad=False) for rows, cols in DISCRIMINATORS[model]
        ]
        parameters = list(weights.parameters())
        forward = _compiled(normalized, implementation)

        def step():
            outputs = forward()
            return *outputs, *torch.autograd.grad(outputs, parameters, cotangents)

        return step

    return Workload("spectral_norm", model, torch.float32, build, quick=quick)


def all_workloads():
    """Every workload, `quick` ones marked."""
    from genkern.bench.loss_workloads import loss_workloads

    return [
        *attentions(),
        *[spectral_norm(model, quick=True) for model in DISCRIMINATORS],
        *loss_workloads(),
    ]
