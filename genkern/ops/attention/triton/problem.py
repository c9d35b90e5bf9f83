"""From tensors to the tuples that Triton's attention kernels take (tiles.py)."""

import math
import struct

import torch

from genkern.ops._tensors import ARITHMETIC
from genkern.ops._triton import double_bits as bits
from genkern.ops.attention.arguments import UNBOUNDED
from genkern.ops.attention.triton.tiles import Bias, Heads, Numbers, Problem

NO_HEADS = Heads(None, None, None, None)
NO_NUMBERS = Numbers(None, None, None)
NO_BIAS = Bias(None, None, None, None, None)


def problem_of(inputs, fixed, settings):
    q, k, v, bias, key_bias = inputs
    scale, softcap, dropout_p, left, right, lower_right, _, _ = settings
    narrow = ARITHMETIC[q.dtype] == torch.float32
    scale = struct.unpack("f", struct.pack("f", scale))[0] if narrow else scale
    is_plain = not softcap and bias is None and key_bias is None
    magnitude = abs(scale) or 1.0
    return Problem(
        heads(q, fixed),
        heads(k, fixed),
        heads(v, fixed),
        bias_of(bias),
        numbers(key_bias, fixed),
        fixed.key_lengths,
        fixed.q_starts,
        fixed.k_starts,
        fixed.seed,
        # At p = 1 the largest word stays, times 0.
        min(int(dropout_p * 2**32), 2**32 - 1) if fixed.seed is not None else None,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        k.shape[2],
        _bound(left, q, k),
        _bound(right, q, k),
        1 if lower_right else None,
        bits(scale),
        bits(math.copysign(1.0, scale) if scale else 0.0),
        None if is_plain else bits(magnitude),
        bits(softcap) if softcap else None,
        bits(magnitude / softcap) if softcap else None,
        bits((magnitude if is_plain else 1.0) * math.log2(math.e)),
        bits(1 / (1 - dropout_p) if dropout_p < 1 else 0.0),
    )


def _bound(places, q, k):
    """No key is further away than there are rows: a clamped bound means the same."""
    return None if places >= UNBOUNDED else min(places, q.shape[2] + k.shape[2])


def heads(x, fixed):
    if x is None:
        return NO_HEADS
    batch, head, row, _ = x.stride()
    return Heads(x, batch if fixed.q_starts is None else 0, head, row)


def numbers(x, fixed):
    if x is None:
        return NO_NUMBERS
    batch, head, _ = x.stride()
    return Numbers(x, batch if fixed.q_starts is None else 0, head)


def bias_of(x):
    if x is None:
        return NO_BIAS
    strides = (s if size > 1 else 0 for s, size in zip(x.stride(), x.shape, strict=True))
    return Bias(x.view(torch.int8) if x.dtype == torch.bool else x, *strides)
