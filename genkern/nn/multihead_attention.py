"""torch.nn.MultiheadAttention on genkern's attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import genkern


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` without the N×M matrix, differentiable twice.

    concat(head_1, …, head_h)·W_oᵀ + b_o with head_i = softmax(Q_i·K_iᵀ/√d + masks)·V_i and
    d = embed_dim / num_heads (Vaswani et al. 2017). A drop-in: the constructor's arguments
    (embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
    device, dtype), parameters, initialisation and state dict are torch's own, and so are the types
    of the exceptions.

    Where it is not torch's: a query that may look at no key at all gets zeros from the attention,
    and zero gradients, where torch gives NaN. With is_causal and a key that was appended
    (add_bias_kv, add_zero_attn) every query sees that key, whether or not the weights are asked
    for. Nested tensors are not taken. (In eval mode without gradients `nn.TransformerEncoderLayer`
    takes a fast path of torch's own, which reads the weights and calls no attention module.)
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attended values, and the weights or None.

        Args:
            query: [N, B, embed_dim], with batch_first [B, N, embed_dim], or [N, embed_dim]; any
                float dtype, the weights' own.
            key: [M, B, kdim], [B, M, kdim] or [M, kdim].
            value: [M, B, vdim], [B, M, vdim] or [M, vdim].
            key_padding_mask: [B, M] or [M]; boolean, True hides the key, or added to the logits.
            need_weights: also return the weights, after dropout, by the path that stores them.
                False runs `genkern.attention`, which never holds N×M.
            attn_mask: [N, M] or [B·num_heads, N, M]; boolean, True hides, or added to the logits.
                Together with a key_padding_mask it becomes one mask of B or B·num_heads times N×M.
            average_attn_weights: the weights' mean over the heads rather than each head's.
            is_causal: a promise that attn_mask, which must be given, is the causal mask: then
                need_weights=False does not read it, and keeps a key_padding_mask apart.

        Returns: the output, in query's shape, and with need_weights the weights: [B, N, M], without
        average_attn_weights [B, num_heads, N, M]; no B for inputs without; M counts appended keys.

        Floating masks have gradients. Raises AssertionError for a wrong number of dimensions, sizes
        of query, key and value that do not match, or a mask that is neither boolean nor floating;
        RuntimeError for an attn_mask of the wrong size, another batch in key than in query, a
        mask of another floating dtype (half precision takes float32 masks) and is_causal without
        attn_mask.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise AssertionError(
                "MultiheadAttention: query, key and value must be plain tensors, not nested ones"
            )
        is_batched = query.dim() == 3
        batch_first = self.batch_first or not is_batched
        self._check_inputs(query, key, value, batch_first)
        sizes = self._sizes(query, key, batch_first)
        _check_masks(key_padding_mask, attn_mask, sizes, is_batched, is_causal)

        heads = self.num_heads
        q, k, v = (_split_heads(x, heads, batch_first) for x in self._project(query, key, value))
        q, k, v = (x if is_batched else x.unsqueeze(0) for x in (q, k, v))
        k, v, appended = self._append_keys(k, v)
        is_causal = is_causal and not need_weights and not appended
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            _check_precision(name, mask, q.dtype)
        mask = _one_mask(key_padding_mask, None if is_causal else attn_mask, sizes, appended)
        dropout_p = self.dropout if self.training else 0.0
        if need_weights:
            out, weights = _materialised(q, k, v, mask, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        else:
            out = genkern.attention(q, k, v, mask, dropout_p, is_causal)
            weights = None
        out = out if is_batched else out.squeeze(0)
        return self.out_proj(_join_heads(out, batch_first)), weights

    def _project(self, query, key, value):
        """q, k, v before they are split into heads, in as few products as their identity allows."""
        bias = self.in_proj_bias
        if self.in_proj_weight is not None:
            if query is key and key is value:
                return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return map(F.linear, (query, key, value), weights, biases)

    def _append_keys(self, k, v):
        """k and v with the keys that add_bias_kv and add_zero_attn bring, and how many."""
        appended_k, appended_v = [], []
        if self.bias_k is not None:
            for bias, appended in ((self.bias_k, appended_k), (self.bias_v, appended_v)):
                one = bias.view(1, self.num_heads, 1, self.head_dim).to(k.dtype)
                appended.append(one.expand(len(k), -1, -1, -1))
        if self.add_zero_attn:
            appended_k.append(k.new_zeros((*k.shape[:2], 1, k.shape[3])))
            appended_v.append(v.new_zeros((*v.shape[:2], 1, v.shape[3])))
        if not appended_k:
            return k, v, 0
        return torch.cat([k, *appended_k], 2), torch.cat([v, *appended_v], 2), len(appended_k)

    def _sizes(self, query, key, batch_first):
        """B (1 where there is none), heads, N, M."""
        if query.dim() == 2:
            return 1, self.num_heads, query.shape[0], key.shape[0]
        batch, rows = (0, 1) if batch_first else (1, 0)
        return query.shape[batch], self.num_heads, query.shape[rows], key.shape[rows]

    def _check_inputs(self, query, key, value, batch_first):
        if query.dim() not in (2, 3):
            raise AssertionError(
                f"MultiheadAttention: query must have 2 dimensions, or 3 with a batch, not "
                f"{query.dim()}"
            )
        for name, x in (("key", key), ("value", value)):
            if x.dim() != query.dim():
                raise AssertionError(
                    f"MultiheadAttention: {name} must have {query.dim()} dimensions, as query, "
                    f"not {x.dim()}"
                )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"MultiheadAttention: query must have {self.embed_dim} features, not "
                f"{query.shape[-1]}"
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"MultiheadAttention: value must have key's length and batch "
                f"{list(key.shape[:-1])}, not {list(value.shape[:-1])}"
            )
        # torch's two ways of projecting fail differently.
        packed = self.in_proj_weight is not None and key.shape == value.shape
        for name, x, features in (("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != features:
                raise (RuntimeError if packed else AssertionError)(
                    f"MultiheadAttention: {name} must have {features} features, not {x.shape[-1]}"
                )
        batch = 0 if batch_first else 1
        if query.dim() == 3 and key.shape[batch] != query.shape[batch]:
            raise RuntimeError(
                f"MultiheadAttention: key must have query's batch of {query.shape[batch]}, not "
                f"{key.shape[batch]}"
            )


def _check_masks(key_padding_mask, attn_mask, sizes, is_batched, is_causal):
    batch, heads, rows, keys = sizes
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "MultiheadAttention: attn_mask must be the causal mask with is_causal, not None"
        )
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(
                f"MultiheadAttention: {name} must be boolean or floating, not {mask.dtype}"
            )
    if key_padding_mask is not None:
        expected = [batch, keys] if is_batched else [keys]
        if list(key_padding_mask.shape) != expected:
            raise AssertionError(
                f"MultiheadAttention: key_padding_mask must be {expected}, not "
                f"{list(key_padding_mask.shape)}"
            )
    if attn_mask is not None:
        if attn_mask.dim() not in (2, 3):
            raise AssertionError(
                f"MultiheadAttention: attn_mask must have 2 or 3 dimensions, not {attn_mask.dim()}"
            )
        expected = [rows, keys] if attn_mask.dim() == 2 else [batch * heads, rows, keys]
        if list(attn_mask.shape) != expected:
            error = RuntimeError if is_batched or attn_mask.dim() == 2 else AssertionError
            raise error(
                f"MultiheadAttention: attn_mask must be {expected}, not {list(attn_mask.shape)}"
            )


def _check_precision(name, mask, dtype):
    """`dtype`: the logits'. Half precision may be masked in fp32, in which it is computed."""
    if mask is None or mask.dtype in (torch.bool, dtype):
        return
    if mask.dtype != torch.float32 or dtype == torch.float64:
        raise RuntimeError(
            f"MultiheadAttention: {name} must be boolean or {dtype}, as query, not {mask.dtype}"
        )


def _one_mask(key_padding_mask, attn_mask, sizes, appended):
    """What `genkern.attention` takes: None, or broadcastable to [B, heads, N, M]; boolean (False
    hides, unlike here) where both are, else added to the logits. Appended keys are seen by all."""
    batch, heads, rows, keys = sizes
    masks = []
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(batch, 1, 1, keys))
    if attn_mask is not None:
        leading = (batch, heads) if attn_mask.dim() == 3 else (1, 1)
        masks.append(attn_mask.view(*leading, rows, keys))
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return F.pad(~hidden, (0, appended), value=True) if appended else ~hidden
    added = sum(_as_logits(mask, masks) for mask in masks)
    return F.pad(added, (0, appended)) if appended else added


def _as_logits(mask, masks):
    if mask.dtype != torch.bool:
        return mask
    dtype = next(other.dtype for other in masks if other.dtype != torch.bool)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def _materialised(q, k, v, mask, dropout_p):
    """softmax(q·kᵀ/√d + mask)·v and its weights [B, heads, N, M]; zeros where nothing is seen."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -torch.inf)
        else:
            logits = logits + mask
    sees_nothing = (logits == -torch.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(sees_nothing, 0.0).softmax(-1).masked_fill(sees_nothing, 0.0)
    weights = F.dropout(weights, dropout_p)
    return weights @ v, weights


def _split_heads(x, heads, batch_first):
    """[B, rows, E], [rows, B, E] or [rows, E] as [(B,) heads, rows, d]: a view."""
    x = x.unflatten(-1, (heads, -1))
    return x.transpose(-3, -2) if batch_first else x.permute(1, 2, 0, 3)


def _join_heads(x, batch_first):
    x = x.transpose(-3, -2) if batch_first else x.permute(2, 0, 1, 3)
    return x.flatten(-2)
