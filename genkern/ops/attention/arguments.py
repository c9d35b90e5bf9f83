"""The arguments of attention in canonical form, and what is said of bad ones.

Canonical are four dimensions: q [B, H, N, d], k [B, Hk, M, d], v [B, Hk, M, dv], a general bias
with its true sizes (1 where it is broadcast), a key bias [B, Hk, M] in the arithmetic dtype. Of
sequences that lie one after another B is 1 and `Fixed` holds where they start.
"""

import itertools
import math
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from genkern.ops._tensors import ARITHMETIC, check_floating

OP = "attention"
UNBOUNDED = 2**62
ALIGNMENTS = ("upper_left", "lower_right")
SIMILARITIES = ("dot", "l2")


class Settings(NamedTuple):
    """The numbers. softcap 0: none; left, right: how many keys beside its own place a query sees;
    longest_q and longest_k: of several sequences, 0 where not yet known."""

    scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    lower_right: bool = False
    longest_q: int = 0
    longest_k: int = 0


class Fixed(NamedTuple):
    """Tensors without derivatives, int64: key_lengths [B], q_starts and k_starts [sequences + 1],
    the seed of dropout, 0-d; all on q's device."""

    key_lengths: Tensor | None = None
    q_starts: Tensor | None = None
    k_starts: Tensor | None = None
    seed: Tensor | None = None


NOTHING_FIXED = Fixed()


# ---- Numbers ------------------------------------------------------------------------------------


def checked_settings(
    features,
    dropout_p,
    is_causal,
    scale,
    window,
    alignment,
    softcap,
    similarity,
    longest_q=0,
    longest_k=0,
):
    """Settings, with the scale of the dot product that stands for an L2 similarity."""
    if scale is None:
        scale = 1 / math.sqrt(max(1, features))
    else:
        _check_number("scale", scale, " or None")
        if not abs(scale) < math.inf:  # math.isfinite cannot be traced with a symbolic scale
            raise ValueError(f"{OP}: scale must be finite, not {scale}")
        scale = float(scale)
    if dropout_p:
        _check_number("dropout_p", dropout_p)
        if not 0 <= dropout_p <= 1:
            raise ValueError(f"{OP}: dropout_p must be between 0 and 1, not {dropout_p}")
    if softcap is not None:
        _check_number("softcap", softcap, " or None")
        if not 0 < softcap < math.inf:
            raise ValueError(f"{OP}: softcap must be positive and finite, not {softcap}")
    if alignment not in ALIGNMENTS:
        raise ValueError(
            f"{OP}: alignment must be 'upper_left' or 'lower_right', not {alignment!r}"
        )
    if similarity not in SIMILARITIES:
        raise ValueError(f"{OP}: similarity must be 'dot' or 'l2', not {similarity!r}")
    if similarity == "l2":
        if softcap is not None:
            raise ValueError(
                f"{OP}: softcap must be None with similarity='l2', whose distances have no "
                f"upper bound to cap, not {softcap}"
            )
        scale = 2 * scale
    left, right = (UNBOUNDED, UNBOUNDED) if window is None else _bounds(window)
    return Settings(
        scale,
        float(softcap or 0.0),
        float(dropout_p or 0.0),
        left,
        min(right, 0) if is_causal else right,
        alignment == "lower_right",
        longest_q,
        longest_k,
    )


def _check_number(name, value, alternative=""):
    if not isinstance(value, Real):
        raise TypeError(f"{OP}: {name} must be a number{alternative}, not {type(value).__name__}")


def _bounds(window):
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{OP}: window must be a pair (left, right) or None, not {window!r}")
    for bound in window:
        if bound is not None and (not isinstance(bound, Integral) or isinstance(bound, bool)):
            raise TypeError(f"{OP}: window must hold integers or None, not {type(bound).__name__}")
        if bound is not None and bound < -1:
            raise ValueError(
                f"{OP}: window must hold numbers of keys, None or -1 for no bound, not {bound}"
            )
    return tuple(UNBOUNDED if b is None or b == -1 else min(int(b), UNBOUNDED) for b in window)


# ---- Queries, keys, values ----------------------------------------------------------------------


def check_qkv(q, k, v):
    check_floating(OP, q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 2:
            raise ValueError(
                f"{OP}: {name} must have at least two dimensions, [..., rows, features], not "
                f"{tuple(x.shape)}"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{OP}: k must have as many features as q, {q.shape[-1]}, not {k.shape[-1]}"
        )
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"{OP}: v must have one row for each key, {k.shape[-2]}, not {v.shape[-2]}"
        )


def broadcast_qkv(q, k, v, enable_gqa):
    """q, k, v in four dimensions, and the leading dimensions [..., H] of the result."""
    if q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]:
        return q, k, v, q.shape[:2]
    dimensions = max(q.ndim, k.ndim, v.ndim)
    shapes = [_leading(x) for x in (q, k, v)]
    batch = ()
    for name, (shape, _) in zip("qkv", shapes, strict=True):
        batch = _broadcast(batch, shape, name, q)
    heads, key_heads = _broadcast_heads(q, *(heads for _, heads in shapes), enable_gqa)
    q = _four_dimensional(q, batch, heads)
    k, v = (_four_dimensional(x, batch, key_heads) for x in (k, v))
    return q, k, v, (*batch, heads) if dimensions > 2 else ()


def _leading(x):
    """The dimensions before the heads, and the number of heads."""
    return tuple(x.shape[:-3]), x.shape[-3] if x.ndim > 2 else 1


def _broadcast(one, other, name, q):
    count = max(len(one), len(other))
    one, other = ((1,) * (count - len(s)) + s for s in (one, other))
    if any(a != b and a != 1 and b != 1 for a, b in zip(one, other, strict=True)):
        raise ValueError(
            f"{OP}: {name} must have leading dimensions that broadcast with q's, "
            f"{tuple(q.shape[:-2])}, and k's; its batch is {other}, not {one}"
        )
    return tuple(b if a == 1 else a for a, b in zip(one, other, strict=True))


def _broadcast_heads(q, heads, k_heads, v_heads, enable_gqa):
    if enable_gqa:
        if v_heads != k_heads:
            raise ValueError(f"{OP}: v must have k's number of heads, {k_heads}, not {v_heads}")
        if k_heads == 0 or heads % k_heads:
            raise ValueError(
                f"{OP}: k must have a number of heads that divides q's, {heads}, with "
                f"enable_gqa, not {k_heads}"
            )
        return heads, k_heads
    for name, other in (("k", k_heads), ("v", v_heads)):
        if other != heads and other != 1 and heads != 1:
            hint = "" if heads % max(1, other) else " (or pass enable_gqa=True)"
            raise ValueError(
                f"{OP}: {name} must have q's number of heads, {heads}, or 1, not {other}{hint}"
            )
        heads = other if heads == 1 else heads
    return heads, heads


def _four_dimensional(x, batch, heads):
    *_, rows, last = x.shape
    if x.ndim == 4 and x.shape[:2] == (*batch, heads):
        return x
    x = x.expand(*batch, heads, rows, last)
    return x if len(batch) == 1 else x.reshape(math.prod(batch), heads, rows, last)


# ---- Masks and lengths --------------------------------------------------------------------------


def canonical_mask(attn_mask, q, k, leading):
    """(bias, key_bias), one of them None. `q`, `k`: in four dimensions."""
    B, H, N, M = *q.shape[:3], k.shape[2]
    arithmetic = ARITHMETIC.get(q.dtype, q.dtype)
    _check_mask(attn_mask, q, arithmetic)
    full = (*(leading or (H,)), N, M)
    missing = len(full) - attn_mask.ndim
    shape = (1,) * missing + tuple(attn_mask.shape)
    if missing < 0 or any(a != 1 and a != b for a, b in zip(shape, full, strict=True)):
        raise ValueError(
            f"{OP}: attn_mask must broadcast to {(*leading, N, M)}, not have the shape "
            f"{tuple(attn_mask.shape)}"
        )
    batch, tail = shape[:-3], shape[-3:]
    if len(batch) > 1 and any(size != 1 for size in batch):
        attn_mask = attn_mask.expand(*full[:-3], *tail)
        batch = (B,)
    bias = attn_mask.reshape(math.prod(batch), *tail)
    if tail[:2] == (1, 1) and tail[2] == M and bias.dtype != torch.bool:
        return None, bias[:, 0].to(arithmetic).expand(B, k.shape[1], M)
    return bias, None


def _check_mask(mask, q, arithmetic):
    if not isinstance(mask, Tensor):
        raise TypeError(f"{OP}: attn_mask must be a tensor or None, not {type(mask).__name__}")
    if mask.dtype not in (torch.bool, q.dtype, arithmetic):
        raise TypeError(
            f"{OP}: attn_mask must be boolean or have q's dtype, {q.dtype}"
            + (f", or {arithmetic}" if arithmetic != q.dtype else "")
            + f", not {mask.dtype}"
        )
    if mask.device != q.device:
        raise ValueError(f"{OP}: attn_mask must be on q's device, {q.device}, not {mask.device}")


def causal_bias_alignment(attn_mask, N, M):
    """The alignment of a torch.nn.attention.bias.CausalBias; None for any other mask."""
    if type(attn_mask) is Tensor or not isinstance(attn_mask, Tensor):
        return None
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(attn_mask, CausalBias):
        return None
    if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (N, M):
        raise ValueError(
            f"{OP}: attn_mask must be a CausalBias for {N} queries and {M} keys, not "
            f"{attn_mask.seq_len_q} and {attn_mask.seq_len_kv}"
        )
    return "upper_left" if attn_mask.variant == CausalVariant.UPPER_LEFT else "lower_right"


def canonical_key_lengths(key_lengths, q, leading):
    """[B], int64."""
    _check_integers("key_lengths", key_lengths, q)
    batch = tuple(leading[:-1])
    missing = len(batch) - key_lengths.ndim
    shape = (1,) * missing + tuple(key_lengths.shape)
    if missing < 0 or any(a != 1 and a != b for a, b in zip(shape, batch, strict=True)):
        raise ValueError(
            f"{OP}: key_lengths must broadcast to q's leading dimensions without heads, {batch}, "
            f"not have the shape {tuple(key_lengths.shape)}"
        )
    return key_lengths.expand(batch).reshape(q.shape[0]).to(torch.int64)


def _check_integers(name, x, q):
    if not isinstance(x, Tensor):
        raise TypeError(f"{OP}: {name} must be a tensor of integers, not {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{OP}: {name} must be of dtype int32 or int64, not {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{OP}: {name} must be on q's device, {q.device}, not {x.device}")


# ---- Sequences one after another ----------------------------------------------------------------


def check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, enable_gqa):
    check_floating(OP, q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(
                f"{OP}: {name} must have three dimensions, [tokens, heads, features], not "
                f"{tuple(x.shape)}"
            )
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"{OP}: k must have as many features as q, {q.shape[2]}, not {k.shape[2]}")
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"{OP}: v must have one row for each key, {k.shape[0]}, not {v.shape[0]}")
    if not enable_gqa and k.shape[1] != q.shape[1]:
        hint = "" if q.shape[1] % max(1, k.shape[1]) else " (or pass enable_gqa=True)"
        raise ValueError(
            f"{OP}: k must have q's number of heads, {q.shape[1]}, not {k.shape[1]}{hint}"
        )
    _broadcast_heads(q, q.shape[1], k.shape[1], v.shape[1], True)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_integers(name, x, q)
        if x.ndim != 1 or x.shape[0] == 0:
            raise ValueError(
                f"{OP}: {name} must have one dimension, [sequences + 1], not {tuple(x.shape)}"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{OP}: cu_seqlens_k must be as long as cu_seqlens_q, {cu_seqlens_q.shape[0]}, not "
            f"{cu_seqlens_k.shape[0]}"
        )


def checked_longest(name, longest):
    if longest is None:
        return 0
    if not isinstance(longest, Integral):
        raise TypeError(f"{OP}: {name} must be an integer or None, not {type(longest).__name__}")
    if longest < 0:
        raise ValueError(f"{OP}: {name} must not be negative, but is {longest}")
    return int(longest)


# ---- Values, where they can be read: never while compiling --------------------------------------


def check_values(inputs, fixed, settings):
    """Raises ValueError for lengths and row starts that lie outside of the tensors, where a kernel
    would read. Returns the settings, with the longest sequences."""
    q, k = inputs[:2]
    if fixed.key_lengths is not None:
        _check_key_lengths(fixed.key_lengths.tolist(), k.shape[2])
    if fixed.q_starts is None:
        return settings
    found = []
    for name, starts, total in (
        ("q", fixed.q_starts, q.shape[2]),
        ("k", fixed.k_starts, k.shape[2]),
    ):
        longest = _longest(f"cu_seqlens_{name}", starts.tolist(), total)
        told = settings.longest_q if name == "q" else settings.longest_k
        if told and told < longest:
            raise ValueError(
                f"{OP}: max_seqlen_{name} must be at least the longest sequence, {longest}, not "
                f"{told}"
            )
        found.append(longest)
    return settings._replace(longest_q=found[0], longest_k=found[1])


def check_longest(inputs, fixed, settings):
    """The settings, with the longest sequences. On a GPU values are read only where these are not
    told, because reading waits for the device: there the kernels keep within the tensors."""
    told = fixed.q_starts is None or (settings.longest_q and settings.longest_k)
    if inputs[0].is_cuda and told:
        return settings
    return check_values(inputs, fixed, settings)


def _check_key_lengths(lengths, keys):
    if lengths and not (min(lengths) >= 0 and max(lengths) <= keys):
        bad = min(lengths) if min(lengths) < 0 else max(lengths)
        raise ValueError(
            f"{OP}: key_lengths must lie between 0 and the number of keys, {keys}, not hold {bad}"
        )


def _longest(name, starts, total):
    if starts[0] != 0:
        raise ValueError(f"{OP}: {name} must begin with 0, not {starts[0]}")
    if starts[-1] != total:
        raise ValueError(
            f"{OP}: {name} must end with the number of rows, {total}, not {starts[-1]}"
        )
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    if lengths and min(lengths) < 0:
        raise ValueError(f"{OP}: {name} must not decrease, but holds {starts}")
    return max(lengths, default=0)
