"""Modules made of genkern's ops."""

from genkern.nn.averaging import averaged
from genkern.nn.diffusers import attention_processor
from genkern.nn.hugging_face import register_with_transformers
from genkern.nn.l2_self_attention import L2SelfAttention2d
from genkern.nn.multihead_attention import MultiheadAttention
from genkern.nn.self_attention2d import SelfAttention2d
from genkern.nn.spectral_norm.state_dicts import convert_spectral_norm

__all__ = [
    "L2SelfAttention2d",
    "MultiheadAttention",
    "SelfAttention2d",
    "attention_processor",
    "averaged",
    "convert_spectral_norm",
    "register_with_transformers",
]
