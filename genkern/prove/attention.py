"""Attention with its features, beside the same in eager PyTorch."""

import torch

import genkern
from genkern.bench.workload import Workload, numbers


def attention(
    *shape,
    M=None,
    dv=None,
    key_heads=None,
    dtype=torch.float32,
    derivative="backward",
    bias=False,
    **options,
):
    """shape: B, H, N, d. derivative: as in genkern.bench.workloads.attention. bias: whether a full
    one, with a gradient, is added. options: is_causal, window, softcap, of genkern.attention."""
    B, H, N, d = shape
    M, dv, key_heads = M or N, dv or d, key_heads or H

    def build(implementation, dtype):
        inputs = [
            numbers(B, H, N, d, dtype=dtype),
            numbers(B, key_heads, M, d, dtype=dtype),
            numbers(B, key_heads, M, dv, dtype=dtype),
            *([numbers(H, N, M, dtype=dtype)] if bias else []),
        ]
        cotangent = numbers(B, H, N, dv, dtype=dtype, grad=derivative == "second order")
        tangents = tuple(numbers(*x.shape, dtype=dtype, grad=False) for x in inputs)
        attend = ours if implementation == "genkern" else eager

        def function(q, k, v, mask=None):
            return attend(q, k, v, mask, **options)

        def backward():
            out = function(*inputs)
            return out, *torch.autograd.grad(out, inputs, cotangent)

        def second_order():
            grads = torch.autograd.grad(function(*inputs), inputs, cotangent, create_graph=True)
            return torch.autograd.grad(grads, (*inputs, cotangent), tangents)

        def jvp():
            return torch.func.jvp(function, tuple(x.detach() for x in inputs), tangents)

        return {"backward": backward, "second order": second_order, "jvp": jvp}[derivative]

    op = "attention" if derivative == "backward" else f"attention {derivative}"
    ratio = 1.25 if derivative == "backward" else 2.0
    words = [f"{B}×{H}×{N}×{d}"]
    words += [f"M={M}"] if M != N else []
    words += [f"dv={dv}"] if dv != d else []
    words += [f"Hk={key_heads}"] if key_heads != H else []
    words += ["bias"] if bias else []
    words += ["causal" if name == "is_causal" else name for name in options]
    return Workload(op, " ".join(words), dtype, build, error_ratio=ratio)


def ours(q, k, v, mask, **options):
    return genkern.attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1], **options)


def eager(q, k, v, mask, is_causal=False, window=None, softcap=None):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    left, right = window or (k.shape[2] + q.shape[2],) * 2
    hidden = (distance < -left) | (distance > (min(right, 0) if is_causal else right))
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
