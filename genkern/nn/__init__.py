"""Modules made of genkern's ops."""

from genkern.nn.self_attention2d import SelfAttention2d

__all__ = ["SelfAttention2d"]
