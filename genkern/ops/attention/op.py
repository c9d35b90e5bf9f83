"""Attention: arguments, choice of backend, autograd, torch.library."""

import math

from genkern import backend as backends
from genkern.ops._tensors import check_floating
from genkern.ops.attention import reference

OP = "attention"
KERNELS = ()


def attention(q, k, v, *, is_causal=False, scale=None):
    """softmax(scale·q·kᵀ)·v, without the N×M matrix in memory.

    q [..., N, d], k [..., M, d], v [..., M, dv] -> [..., N, dv]
    """
    check_floating(OP, q=q, k=k, v=v)
    scale = 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else float(scale)
    backends.choose(OP, q, KERNELS)
    return reference.attention(q, k, v, is_causal, scale)
