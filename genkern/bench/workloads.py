"""What is measured: each workload is one forward and backward, or a derivative of another kind,
prepared once per implementation.

`Workload.prepare(name)` gives a function without arguments that runs it and returns outputs and
gradients. "eager" is what people write today, "compile" the same through
torch.compile, "sdpa" PyTorch's fused attention, "genkern" ours, "exact" eager in fp64. All get the
same numbers.
"""

from functools import partial

import torch
import torch.nn.functional as F

import genkern
from genkern.bench.likelihood_workloads import likelihoods
from genkern.bench.loss_workloads import loss_workloads
from genkern.bench.penalty_workloads import penalties
from genkern.bench.spectral_workloads import spectral_norms
from genkern.bench.workload import Workload, compiled, numbers

# ---- Attention ----------------------------------------------------------------------------------


def eager_attention(q, k, v, is_causal=False):
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if is_causal:
        blocked = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
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
    """`derivative`: "none": forward without a graph; "backward": forward and backward; "second
    order": a gradient penalty's step, the gradients of ⟨the gradients, random tangents⟩ after
    forward and backward; "jvp": the output and its tangent, in forward mode."""
    M, dv = M or N, dv or d

    def build(implementation, dtype):
        q = numbers(B, H, N, d, dtype=dtype)
        k = numbers(B, H, M, d, dtype=dtype)
        v = numbers(B, H, M, dv, dtype=dtype)
        cotangent = numbers(B, H, N, dv, dtype=dtype, grad=derivative == "second order")
        tangents = tuple(numbers(*x.shape, dtype=dtype, grad=False) for x in (q, k, v))
        function = {"genkern": genkern.attention, "sdpa": F.scaled_dot_product_attention}.get(
            implementation, eager_attention
        )
        function = compiled(partial(function, is_causal=is_causal), implementation)

        @torch.no_grad()
        def forward():
            return (function(q, k, v),)

        def backward():
            out = function(q, k, v)
            return out, *torch.autograd.grad(out, (q, k, v), cotangent)

        def second_order():
            grads = torch.autograd.grad(function(q, k, v), (q, k, v), cotangent, create_graph=True)
            return torch.autograd.grad(grads, (q, k, v, cotangent), tangents)

        def jvp():
            return torch.func.jvp(function, tuple(x.detach() for x in (q, k, v)), tangents)

        steps = {"none": forward, "backward": backward, "second order": second_order, "jvp": jvp}
        return steps[derivative]

    keys = "" if M == N and dv == d else f" M={M} dv={dv}"
    shape = f"{B}×{H}×{N}×{d}{keys}{' causal' if is_causal else ''}"
    if derivative in ("none", "backward"):
        op = "attention forward" if derivative == "none" else "attention"
        return Workload(op, shape, dtype, build, ("compile", "sdpa"), quick)
    return Workload(f"attention {derivative}", shape, dtype, build, (), quick, error_ratio=2.0)


# B, H, N, d and options: a transformer's, a long sequence, small heads, SAGAN's blocks.
SHAPES = (
    (1, 4, 1024, 64, {}),
    (1, 4, 1024, 64, {"is_causal": True}),
    (1, 1, 4096, 64, {}),
    (8, 1, 1024, 32, {}),
    (4, 8, 256, 64, {"is_causal": True}),
    (1, 2, 4096, 128, {"is_causal": True}),
    (8, 1, 1024, 24, {"M": 256, "dv": 96}),
    (8, 1, 4096, 24, {"M": 1024, "dv": 96}),
)
# What fills a GPU.
GPU_SHAPES = (
    (4, 16, 2048, 64, {}),
    (4, 16, 2048, 64, {"is_causal": True}),
    (4, 16, 2048, 128, {"is_causal": True}),
    (1, 8, 8192, 64, {"is_causal": True}),
    (64, 8, 256, 64, {"is_causal": True}),
    (64, 1, 1024, 24, {"M": 256, "dv": 96}),
    (32, 1, 4096, 24, {"M": 1024, "dv": 96}),
)


def attentions(shapes=SHAPES):
    quick = {
        (1, 4, 1024, 64): "compiled",
        (1, 1, 4096, 64): True,
        (8, 1, 1024, 24): True,
        (4, 16, 2048, 64): "compiled",
        (64, 1, 1024, 24): True,
    }
    for dtype in (torch.float32, torch.bfloat16):
        for derivative in ("none", "backward", "second order", "jvp"):
            for B, H, N, d, options in shapes:
                in_quick = dtype == torch.float32 and derivative != "none"
                yield attention(
                    *(B, H, N, d),
                    **options,
                    dtype=dtype,
                    derivative=derivative,
                    quick=in_quick
                    and not options.get("is_causal")
                    and quick.get((B, H, N, d), False),
                )


def all_workloads(device="cpu"):
    """Every workload of a kind of device, `quick` ones marked."""
    return [
        *attentions(SHAPES if device == "cpu" else GPU_SHAPES),
        *spectral_norms(),
        *loss_workloads(),
        *penalties(),
        *likelihoods(),
    ]
