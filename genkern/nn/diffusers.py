"""genkern's attention inside the models of Hugging Face's diffusers."""

import copy

import genkern
from genkern.redirect import Redirection


def attention_processor(processor=None):
    """An attention processor of diffusers that computes with `genkern.attention`:

        unet.set_attn_processor(genkern.nn.attention_processor())
        module.set_processor(genkern.nn.attention_processor(module.processor))

    processor: the one whose copy is returned, with its calls of scaled_dot_product_attention and
        of diffusers' dispatch_attention_fn redirected; by default `AttnProcessor2_0()`. The
        projections, norms and masks around the attention stay its own.

    Raises ImportError without diffusers, and ValueError for a processor that calls neither, with
    the reason.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    result = AttnProcessor2_0() if processor is None else copy.copy(processor)
    found = Redirection().of_object(result)
    if found.result is None:
        reasons = "".join(f"; {where}: {why}" for where, why in found.left)
        raise ValueError(
            f"attention_processor: processor must call scaled_dot_product_attention or "
            f"dispatch_attention_fn, and {type(result).__name__} does not{reasons}"
        )
    return result


def dispatched_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    attention_kwargs=None,
    *,
    backend=None,
    parallel_config=None,
):
    """diffusers' dispatch_attention_fn: query, key, value and the result are [B, N, H, d]."""
    if parallel_config is not None or attention_kwargs:
        raise NotImplementedError(
            "attention: parallel_config and attention_kwargs are not supported by genkern: call "
            "genkern.unpatch on the model, or keep its own attention processor"
        )
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None, :]  # of the keys
    out = genkern.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return out.transpose(1, 2)
