"""A causal transformer over bytes: 256 tokens, learned positions, pre-normalised blocks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import genkern

VOCABULARY = 256


class ByteTransformer(nn.Module):
    """tokens [B, T ≤ context] (int64 bytes) to logits [B, T, 256] of the byte after each."""

    def __init__(self, context: int, *, width=128, layers=4, heads=4) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width ({width}) must be a multiple of heads ({heads})")
        self.context = context
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, layers) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, VOCABULARY, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.normal_(self.logits.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"tokens: at most {self.context} fit the context, not {length}")
        x = self.token(tokens) + self.position.weight[:length]
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


class Block(nn.Module):
    """x + attention, then + a two-layer perceptron of four times the width."""

    def __init__(self, width, heads, layers):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        for linear in (self.qkv, self.up, self.out, self.down):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        # GPT-2's start: the sum over the residual branches keeps its variance at any depth.
        for last in (self.out, self.down):
            nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, x):
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, 2)
        )
        attended = genkern.attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@torch.no_grad()
def continue_text(model, prompt: bytes, length: int, *, temperature=0.8, generator=None):
    """Yields `length` bytes (ints) that follow `prompt`, drawn from the model's distribution
    sharpened by `temperature` > 0; the model sees its last `context` bytes. An empty prompt starts
    like a new paragraph."""
    device = next(model.parameters()).device
    tokens = torch.tensor([list(prompt or b"\n")], device=device)
    for _ in range(length):
        logits = model(tokens[:, -model.context :])[0, -1].double() / temperature
        following = torch.multinomial(logits.softmax(0).cpu(), 1, generator=generator)
        yield following.item()
        tokens = torch.cat([tokens, following.to(device)[None]], 1)
