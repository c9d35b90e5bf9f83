"""genkern's attention inside the models of Hugging Face's transformers."""

import torch
from torch import Tensor

import genkern


def register_with_transformers(name: str = "genkern") -> None:
    """Makes `genkern.attention` one of transformers' attention implementations, under `name`:

        genkern.nn.register_with_transformers()
        model = AutoModel.from_config(config, attn_implementation="genkern")
        model.set_attn_implementation("genkern")        # or a model that is there already

    For every model that transformers lets choose its attention. Masks are made as for "sdpa": none
    where the model is causal and nothing is padded. As there, attention weights are not returned:
    output_attentions gives None.

    Raises ImportError where transformers is not installed, or too old to have AttentionInterface
    and AttentionMaskInterface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, _attend)
    AttentionMaskInterface.register(name, sdpa_mask)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:
    """What transformers calls: heads [B, H, N, d] and [B, Hk, M, d] to ([B, N, H, dv], None).

    attention_mask: boolean (False hides) or added, [B|1, H|1, N, M], and then it is the whole mask;
        without one a causal model's queries see the keys up to their own, from the top left.
    position_bias: added to the logits (T5).
    """
    for name in ("s_aux", "cache"):
        if options.get(name) is not None:
            raise NotImplementedError(
                f"attention: {name} (attention sinks, a paged cache) is not supported by genkern: "
                f"choose another attn_implementation for {type(module).__name__}"
            )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    bias = attention_mask
    if position_bias is not None:
        bias = _added(position_bias, attention_mask)
    out = genkern.attention(
        query,
        key,
        value,
        bias,
        dropout,
        is_causal and attention_mask is None and query.shape[2] > 1,
        scale=scaling,
        softcap=softcap,
        enable_gqa=True,
    )
    return out.transpose(1, 2).contiguous(), None


def _added(position_bias, mask):
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, -torch.inf)
    return position_bias + mask
