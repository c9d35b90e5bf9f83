"""The public functions of attention, and the choice of who computes it.

arguments.py makes the arguments canonical, reference.py is the meaning. A similarity of distances
is arithmetic here: -s‖q - k‖² inside a softmax over keys is the dot product with the scale 2s and
the key bias -s‖k‖², whose gradients are finite everywhere; the rest, -s‖q‖², is part of lse alone.
"""

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack, is_functorch_wrapped_tensor

from genkern import backend as backends
from genkern.ops._autograd import transforms_active
from genkern.ops._tensors import ARITHMETIC, is_plain
from genkern.ops.attention import (
    arguments,
    autograd,
    batching,
    choice,
    forward_mode,
    library,
    plans,
    reference,
)
from genkern.ops.attention.arguments import NOTHING_FIXED, OP, Fixed


def attention(
    q,
    k,
    v,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    *,
    scale=None,
    enable_gqa=False,
    window=None,
    alignment="upper_left",
    key_lengths=None,
    softcap=None,
    similarity="dot",
    return_lse=False,
):
    """softmax(S)·v with S = softcap(scale·q·kᵀ) + bias over the keys that a query may see, without
    the N×M matrix in memory. The arguments of PyTorch's scaled_dot_product_attention, and more.

    Args:
        q: queries, [..., H, N, d]; float32, float64, bfloat16 or float16, as k and v.
        k: keys, [..., H, M, d]; the leading dimensions broadcast, any number of them, also none.
        v: values, [..., H, M, dv]; dv may differ from d.
        attn_mask: broadcastable to [..., H, N, M]; boolean (False hides) or added to the logits, of
            q's dtype or the one that it is computed in; then it has a gradient, of its own shape.
            A torch.nn.attention.bias.CausalBias means is_causal with its alignment.
        dropout_p: the probability with which a weight is dropped, always applied; the others are
            multiplied by 1/(1 - dropout_p). The seed is drawn from torch's generator of q's device.
        is_causal: query i sees only keys j ≤ i + offset; may be given beside attn_mask.
        scale: what the products q·k are multiplied by; default 1/√d.
        enable_gqa: k and v may have fewer heads, Hk, that divide H: key head h serves the H/Hk
            query heads from h·H/Hk on.
        window: (left, right): query i sees only the keys from i + offset - left to i + offset +
            right, both included; None or -1 for no bound.
        alignment: "upper_left": offset 0, as PyTorch's is_causal; "lower_right": offset M - N, the
            last query stands at the last key.
        key_lengths: integers of q's leading dimensions without heads, [...]: how many of the M keys
            are there; the rest is padding that nobody sees. On a GPU the values are not looked at,
            which would wait for the device, but kept between 0 and M.
        softcap: c for logits c·tanh(scale·q·k/c), before the bias; default none.
        similarity: "dot", or "l2" for the logits -scale·‖q - k‖² (not together with softcap).
        return_lse: whether to return (out, lse), lse = log Σ exp S [..., H, N], too.

    Returns out [..., H, N, dv] in q's dtype, laid out in memory as q is (so heads that are a
    transposed view stay one). Any strides; only a tensor whose last dimension isn't contiguous is
    copied. Half precision is computed in fp32 and rounded once; lse is fp32 then. A query with
    nothing to see gives zeros, lse -inf, and gradients of zero. Under autocast inputs are cast as
    for PyTorch's own scaled_dot_product_attention.

    Derivatives: any number, in forward and reverse mode, by torch.autograd and torch.func, also
    inside of a compiled function. The first two and forward mode are kernels; what lies beyond is
    plain PyTorch, with the matrix. Dropout under torch.func.vmap raises NotImplementedError.

    Raises TypeError for other dtypes or kinds of arguments, ValueError for shapes and numbers that
    don't fit, each naming the argument.

    Source: Vaswani et al. 2017, eq. 1; online softmax: Milakov & Gimelshein 2018; recomputation
    in the backward: Dao et al. 2022 (FlashAttention); softcap: Gemma 2, 2024; distances: Kim et
    al. 2021, https://arxiv.org/abs/2006.04710.
    """
    if (
        not torch.compiler.is_compiling()
        and (key_lengths is None and window is None and softcap is None)
        and (dropout_p == 0 and alignment == "upper_left" and similarity == "dot")
        and not return_lse
        and type(is_causal) is type(enable_gqa) is bool
        and (scale is None or type(scale) is float)
    ):
        out = plans.attention(q, k, v, attn_mask, is_causal, scale, enable_gqa)
        if out is not None:
            return out
    q, k, v = _autocast(q, k, v)
    arguments.check_qkv(q, k, v)
    causal_alignment = arguments.causal_bias_alignment(attn_mask, q.shape[-2], k.shape[-2])
    if causal_alignment is not None:
        attn_mask, is_causal, alignment = None, True, causal_alignment
    settings = arguments.checked_settings(
        q.shape[-1], dropout_p, is_causal, scale, window, alignment, softcap, similarity
    )
    q, k, v, leading = arguments.broadcast_qkv(q, k, v, enable_gqa)
    bias = key_bias = None
    if attn_mask is not None:
        bias, key_bias = arguments.canonical_mask(_cast_mask(attn_mask, q), q, k, leading)
    fixed = NOTHING_FIXED
    if key_lengths is not None:
        fixed = Fixed(arguments.canonical_key_lengths(key_lengths, q, leading))
    out, lse = _attend((q, k, v, bias, key_bias), fixed, settings, similarity, return_lse)
    if len(leading) != 2:
        out = out.reshape(*leading, *out.shape[-2:])
        lse = lse.reshape(*leading, lse.shape[-1]) if return_lse else None
    return (out, lse) if return_lse else out


def attention_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    *,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    window=None,
    alignment="upper_left",
    softcap=None,
    similarity="dot",
    return_lse=False,
):
    """`attention` of several sequences of different lengths that lie one after another: every query
    sees the keys of its own sequence only.

    Args:
        q: queries, [Tq, H, d]; the rows of all sequences.
        k: keys, [Tk, Hk, d].
        v: values, [Tk, Hk, dv].
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [sequences + 1]: sequence s has the queries
            cu_seqlens_q[s] to cu_seqlens_q[s + 1] - 1, and keys likewise. They begin with 0, don't
            decrease, and end with Tq and Tk.
        max_seqlen_q, max_seqlen_k: the longest sequence or more, as other libraries want it; found
            out where not given. On a GPU give both: finding out waits for the device.
        The rest as in `attention`; offsets and windows count within a sequence.

    Returns out [Tq, H, dv], and lse [H, Tq] with return_lse.

    Raises TypeError and ValueError as `attention`, and ValueError for row starts as above.
    """
    q, k, v = _autocast(q, k, v)
    arguments.check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, enable_gqa)
    settings = arguments.checked_settings(
        *(q.shape[-1], dropout_p, is_causal, scale, window, alignment, softcap, similarity),
        longest_q=arguments.checked_longest("max_seqlen_q", max_seqlen_q),
        longest_k=arguments.checked_longest("max_seqlen_k", max_seqlen_k),
    )
    fixed = Fixed(None, cu_seqlens_q.to(torch.int64), cu_seqlens_k.to(torch.int64))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse = _attend((q, k, v, None, None), fixed, settings, similarity, return_lse)
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def _attend(inputs, fixed, settings, similarity, return_lse):
    """(out, lse) for canonical inputs; lse may be None where it wasn't asked for."""
    if settings.dropout_p:
        if not torch.compiler.is_compiling():
            batching.refuse_dropout()
        # Not by _replace, which torch.compile of torch 2.6 does not take.
        fixed = Fixed(
            fixed.key_lengths, fixed.q_starts, fixed.k_starts, _new_seed(inputs[0].device)
        )
    if similarity == "dot":
        return _core(inputs, fixed, settings, return_lse)
    q, k, v, bias, key_bias = inputs
    distance = _minus_square(k, settings.scale / 2)
    key_bias = distance if key_bias is None else key_bias + distance
    out, lse = _core((q, k, v, bias, key_bias), fixed, settings, return_lse)
    return out, lse + _minus_square(q, settings.scale / 2) if return_lse else None


def _minus_square(x, scale):
    return x.to(ARITHMETIC.get(x.dtype, x.dtype)).square().sum(-1) * -scale


def _new_seed(device):
    """On the device, where a replayed CUDA graph draws anew."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def _core(inputs, fixed, settings, return_lse):
    """(out, lse); lse may be None where it wasn't asked for."""
    if not torch.compiler.is_compiling():
        found = forward_mode.attention(inputs, fixed, settings, return_lse)
        if found is not None:
            return found
    if (
        torch.compiler.is_compiling()
        or _is_transformed_once()
        or not all(x is None or is_plain(x) for x in inputs)
    ):
        return library.attention(inputs, fixed, settings)
    backend = choice.choose(OP, inputs)
    if backend == "reference":
        return _by_reference(inputs, fixed, settings)
    return autograd.attention(autograd.ON[backend], inputs, fixed, settings, return_lse)[:2]


def _is_transformed_once():
    """Whether one transform of torch.func is about: the dispatcher goes through it in a third of
    the time that torch's Python takes for a Function. What is beyond the kernels, which more of
    them may want, the reference can't compute in there."""
    return (
        transforms_active()
        and len(get_interpreter_stack()) == 1
        and backends.wanted() != "reference"
    )


def _by_reference(inputs, fixed, settings):
    if not any(x is not None and is_functorch_wrapped_tensor(x) for x in fixed):
        settings = arguments.check_values(inputs, fixed, settings)
    out, lse = reference.attention(inputs, fixed, settings)
    if out.requires_grad and not transforms_active():
        out.register_hook(_record_reference_backward)
    return out, lse


def _record_reference_backward(_):
    backends.record(OP + ".backward", "reference", "the forward ran there")


def _autocast(*tensors):
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    # Autocast knows only some devices, and torch.compile of older torch can't be asked which.
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if _is_cast_by_autocast(x) else x for x in tensors)


def _is_cast_by_autocast(x):
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _cast_mask(attn_mask, q):
    """A mask of the dtype that things are computed in needs no cast."""
    if isinstance(attn_mask, Tensor) and attn_mask.dtype != ARITHMETIC.get(q.dtype):
        (attn_mask,) = _autocast(attn_mask)
    return attn_mask
