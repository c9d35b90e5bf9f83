"""What attention means, in plain PyTorch: any dtype, any number of derivatives."""

import torch


def attention(q, k, v, is_causal=False, scale=1.0):
    """softmax(scale·q·kᵀ)·v over the allowed keys; zeros where a row has none.

    q [..., N, d], k [..., M, d], v [..., M, dv] -> [..., N, dv]. Causal: query i sees keys j ≤ i.
    Half precision is computed in fp32 and rounded once. The N×M matrix is stored.
    """
    logits = scale * (_wide(q) @ _wide(k).transpose(-2, -1))
    if is_causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ _wide(v)).to(q.dtype)


def logsumexp(q, k, is_causal=False, scale=1.0):
    """log Σ exp(scale·q·kᵀ) over the allowed keys, [..., N]; -inf where a row has none."""
    logits = scale * (_wide(q) @ _wide(k).transpose(-2, -1))
    if is_causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~seen, -torch.inf)
    return logits.logsumexp(-1)


def _wide(x):
    return x.float() if x.element_size() < 4 else x
