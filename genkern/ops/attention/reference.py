"""What attention means, in plain PyTorch: any dtype, any number of derivatives.

    X = scale·q·kᵀ     S = softcap·tanh(X/softcap) + bias + key_bias     P = softmax(S)
    out = (Z∘P)·v      lse = log Σ exp S                  each over the keys that the row may see

The four primitives at the end, which the kernels compute in O(N) memory, are derivatives of it by
autograd. The N×M matrix is stored. `inputs` is (q, k, v, bias, key_bias) in the canonical form of
arguments.py, `fixed` and `settings` are its tuples.
"""

import itertools

import torch
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor

INPUTS = 5


def attention(inputs, fixed, settings, rounded=True):
    """(out [B, H, N, dv], lse [B, H, N]); zeros and -inf in a row with nothing to see.

    Half precision is computed in fp32 and out rounded once, or not at all. Sequences of several
    lengths (`fixed.q_starts`) are attended one by one.
    """
    pieces = [_attend(*part, settings) for part in _sequences(inputs, fixed)]
    out, lse = (torch.cat(x, 2) if len(x) > 1 else x[0] for x in zip(*pieces, strict=True))
    return (out.to(inputs[0].dtype) if rounded else out), lse


def softmax_rows(inputs, fixed, settings):
    """[2, B, H, N], what the kernels keep of the softmax: of each row the shift m = max S and
    Σ exp(S - m), both 0 where nothing is seen. Without softcap and biases the shift is in units of
    |scale|, where S = |scale|·(sign(scale)·q·k)."""
    plain = not settings.softcap and inputs[3] is None and inputs[4] is None
    scale = settings.scale
    unit = (abs(scale) or 1.0) if plain else 1.0
    if plain:
        settings = settings._replace(scale=float((scale > 0) - (scale < 0)))
    pieces = [_softmax_rows(*part, settings, unit) for part in _sequences(inputs, fixed)]
    return torch.cat(pieces, 3)


def _softmax_rows(inputs, fixed, batch, settings, unit):
    logits = _logits(inputs, fixed, settings)
    if logits.shape[-1] == 0:
        return logits.new_zeros((2, *logits.shape[:-1]))
    shift = logits.amax(-1)
    nothing = shift == -torch.inf
    shift = shift.masked_fill(nothing, 0)
    total = ((logits - shift[..., None]) * unit).exp().sum(-1)
    return torch.stack([shift, total.masked_fill(nothing, 0)])


def _sequences(inputs, fixed):
    """Each sequence as (inputs, fixed, number): four-dimensional inputs without row starts."""
    if fixed.q_starts is None:
        return [(inputs, fixed, 0)]
    q, k, v, _, key_bias = inputs
    alone = fixed._replace(q_starts=None, k_starts=None)
    starts = zip(*(_boundaries(x) for x in (fixed.q_starts, fixed.k_starts)), strict=True)
    parts = []
    for number, ((q_from, q_to), (k_from, k_to)) in enumerate(starts):
        part = (
            q[:, :, q_from:q_to],
            k[:, :, k_from:k_to],
            v[:, :, k_from:k_to],
            None,
            None if key_bias is None else key_bias[:, :, k_from:k_to],
        )
        parts.append((part, alone, number))
    return parts


def _boundaries(starts):
    # torch 2.6 cannot read numbers inside of its transforms.
    while is_functorch_wrapped_tensor(starts) and not is_batchedtensor(starts):
        starts = get_unwrapped(starts)
    with torch._C._DisableFuncTorch():
        numbers = starts.tolist()
    # No sequence at all is one without rows.
    return list(itertools.pairwise(numbers)) or [(0, 0)]


def _attend(inputs, fixed, batch, settings):
    q, _, v, _, _ = inputs
    logits = _logits(inputs, fixed, settings)
    # A softmax over nothing would be NaN, and so would its gradients: such rows are filled on the
    # way in and out.
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    weights, lse = _softmax(logits.masked_fill(nothing, 0))
    weights = weights.masked_fill(nothing, 0)
    if settings.dropout_p:
        weights = weights * dropout_mask(weights, fixed.seed, settings.dropout_p, batch)
    out = weights @ _for_each_query_head(_wide(v), q)
    return out, lse.masked_fill(nothing[..., 0], -torch.inf)


def _softmax(logits):
    """The softmax and the logsumexp of every row. In steps, because torch's own two cannot be
    differentiated in reverse through forward mode (they write into what that saved, 2.13)."""
    if logits.shape[-1] == 0:
        return logits, logits.sum(-1)
    shift = logits.detach().amax(-1, keepdim=True)
    exponentials = (logits - shift).exp()
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / total, (shift + total.log())[..., 0]


def _logits(inputs, fixed, settings):
    """S [B, H, N, M], -inf where a key may not be seen."""
    q, k, _, bias, key_bias = inputs
    logits = settings.scale * (_wide(q) @ _for_each_query_head(_wide(k), q).transpose(-2, -1))
    if settings.softcap:
        logits = settings.softcap * (logits / settings.softcap).tanh()
    if key_bias is not None:
        logits = logits + _for_each_query_head(key_bias, q)[:, :, None]
    if bias is not None and bias.dtype == torch.bool:
        logits = logits.masked_fill(~bias, -torch.inf)
    elif bias is not None:
        logits = logits + _wide(bias)
    return logits.masked_fill(~_allowed(logits, fixed.key_lengths, settings), -torch.inf)


def _allowed(logits, key_lengths, settings):
    """Which keys lie in each row's interval lo(i) ≤ j < hi(i): [N, M] or [B, 1, N, M]."""
    queries, keys = logits.shape[-2:]
    place = torch.arange(queries, device=logits.device)[:, None]
    place = place + (keys - queries if settings.lower_right else 0)
    j = torch.arange(keys, device=logits.device)
    # No key is that far away: a clamped bound means the same, and can't overflow.
    left, right = (min(bound, queries + keys) for bound in (settings.left, settings.right))
    allowed = (j >= place - left) & (j <= place + right)
    if key_lengths is None:
        return allowed
    return allowed & (j < key_lengths.to(logits.device)[:, None, None, None])


def _for_each_query_head(x, q):
    """[B, Hk, …] as [B, H, …]: every key head serves H/Hk query heads that follow one another."""
    groups = q.shape[1] // max(1, x.shape[1])
    return x if groups == 1 or x.shape[1] == 0 else x.repeat_interleave(groups, 1)


def _wide(x):
    return x.float() if x.element_size() < 4 else x


# ---- Dropout ------------------------------------------------------------------------------------


def dropout_mask(weights, seed, p, batch=0):
    """Z, like weights [B, H, N, M]: 1/(1 - p) where kept, 0 where dropped.

    Key j of query i in head h of batch element b (`batch` is the first one's number) is dropped
    where word j % 4 of Philox4x32-10 is below ⌊p·2³²⌋, with the counter (i, j // 4, b·H + h, 0) and
    the seed as key: a function of the place alone, so that every pass meets the same mask.
    """
    B, H, N, M = weights.shape
    device = weights.device
    i = torch.arange(N, device=device)[:, None]
    quad = torch.arange((M + 3) // 4, device=device)
    head = (batch * H + torch.arange(B * H, device=device)).view(B, H, 1, 1)
    words = torch.stack(_philox((i, quad, head, torch.zeros_like(i)), int(seed)), -1)
    kept = words.flatten(-2)[..., :M] >= int(p * 2**32)
    return kept.to(weights.dtype) * (1 / (1 - p) if p < 1 else 0.0)


_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def _philox(counter, seed):
    """Ten rounds (Salmon et al. 2011) on four broadcastable int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    key0, key1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + _KEY_STEPS[0] & _WORD, key1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def _product(factor, word):
    """The high and the low 32 bits of a product of two 32-bit numbers, within int64."""
    upper, lower = factor * (word >> 16), factor * (word & 0xFFFF)
    return upper + (lower >> 16) >> 16, ((upper & 0xFFFF) << 16) + lower & _WORD


# ---- The primitives: derivatives of it ----------------------------------------------------------


def backward(inputs, fixed, settings, grad_out, grad_lse):
    """The gradients of ⟨grad_out, out⟩ + ⟨grad_lse, lse⟩ for the five inputs; None for a missing
    or boolean one. grad_out or grad_lse may be None, meaning zero."""

    def outputs(*inputs):
        return attention(inputs, fixed, settings)

    return pullback(outputs, inputs, (grad_out, grad_lse))


def second(inputs, fixed, settings, grad_out, grad_lse, tangents):
    """The gradients of ⟨backward(inputs, grad_out, grad_lse), tangents⟩ for the inputs, grad_out
    and grad_lse: seven, None for what is missing. `tangents`: like the inputs, or None for zero."""

    def gradients(*sources):
        return backward(sources[:INPUTS], fixed, settings, *sources[INPUTS:])

    return pullback(gradients, (*inputs, grad_out, grad_lse), tangents)


def jvp(inputs, fixed, settings, tangents):
    """The derivatives of out and lse along `tangents` (None: zero)."""

    def outputs(*inputs):
        return attention(inputs, fixed, settings)

    return pushforward(outputs, inputs, tangents)


def pushforward(function, primals, tangents):
    """The derivatives of the outputs of `function(*primals)` along `tangents` (None: zero). The
    pullback is linear in its cotangents, and this is its transpose: no forward mode, which torch
    cannot nest."""

    def gradients(*cotangents):
        return pullback(function, primals, cotangents)

    zeros = [None if x is None else torch.zeros_like(x) for x in function(*primals)]
    return pullback(gradients, zeros, tangents)


def pullback(function, primals, cotangents):
    """The gradients of Σ ⟨output, cotangent⟩ over the outputs of `function(*primals)`.

    For every primal one, zeros where nothing depends on it; None for None and for what is not
    floating. A cotangent may be None, meaning zero. By torch.func, so that it can itself be
    differentiated, and one tensor in two places is two variables.
    """
    places = [i for i, x in enumerate(primals) if x is not None and x.is_floating_point()]
    moving = [primals[i] for i in places]

    def paired_outputs(*moving):
        full = list(primals)
        for i, x in zip(places, moving, strict=True):
            full[i] = x
        outputs = zip(function(*full), cotangents, strict=True)
        return tuple(o for o, c in outputs if o is not None and c is not None)

    outputs, pull = torch.func.vjp(paired_outputs, *moving)
    given = [c for c in cotangents if c is not None]
    if outputs:
        found = pull(tuple(c.to(o.dtype) for o, c in zip(outputs, given, strict=True)))
    else:
        found = [torch.zeros_like(x) for x in moving]
    results = dict(zip(places, found, strict=True))
    return tuple(results.get(i) for i in range(len(primals)))
