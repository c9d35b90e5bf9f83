"""Text as bytes, its windows, and the bigram model that a language model has to beat."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genkern.train.errors import TrainError

HELD_OUT = 0.1  # the last tenth of the text


class Text(NamedTuple):
    """Bytes as int64 tensors [length]."""

    train: Tensor
    held_out: Tensor
    summary: str


def load_text(source: str | None, context: int) -> Text:
    """The bytes of a file, or of Python's own help topics (source None)."""
    if source is None:
        from pydoc_data.topics import topics

        data = "\n".join(topics[name] for name in sorted(topics)).encode()
        name = "Python's help topics (pydoc_data)"
    else:
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise TrainError(f"could not read --data {source}: {error.strerror}") from None
        name = Path(source).name
    cut = len(data) - int(len(data) * HELD_OUT)
    if len(data) - cut <= context:
        raise TrainError(
            f"{name} has {len(data)} bytes: with a context of {context} it takes at least "
            f"{math.ceil((context + 1) / HELD_OUT)}, since a tenth is held out"
        )
    tokens = torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int64))
    summary = f"{len(data):,} bytes of {name}; the last {len(data) - cut:,} held out"
    return Text(tokens[:cut], tokens[cut:], summary)


def window_count(tokens: Tensor, context: int) -> int:
    """How many windows an epoch has, at any shift of their common grid."""
    return (len(tokens) - context) // context


def windows(tokens: Tensor, indices: Tensor, context: int, shift: int) -> Tensor:
    """[B, context + 1]: window i starts at shift + i·context, 0 ≤ shift < context."""
    starts = shift + indices * context
    return tokens[starts[:, None] + torch.arange(context + 1)]


def bigram_perplexity(train: Tensor, held_out: Tensor) -> float:
    """Perplexity a byte of held_out[1:] under a bigram model of `train`, smoothed after Witten and
    Bell (1991):

        p(b | a) = (count(ab) + kinds(a) · p(b)) / (count(a) + kinds(a))

    where kinds(a) is the number of different bytes that follow a, and p(b) = (count(b) + 1) /
    (length + 256). An a that training never saw falls back to p(b).
    """
    pairs = torch.bincount(train[:-1] * 256 + train[1:], minlength=256 * 256).view(256, 256)
    pairs = pairs.double()
    unigram = (torch.bincount(train, minlength=256).double() + 1) / (len(train) + 256)
    kinds = (pairs > 0).sum(1, keepdim=True).double().clamp(min=1)
    bigram = (pairs + kinds * unigram) / (pairs.sum(1, keepdim=True) + kinds)
    return math.exp(-bigram[held_out[:-1], held_out[1:]].log().mean())


@torch.no_grad()
def model_perplexity(model, held_out: Tensor, context: int, *, batch_size=32) -> float:
    """Perplexity a byte of held_out[1:] under model(tokens [B, T]) -> logits [B, T, 256]. Windows
    overlap by half: every byte but the first few is predicted from at least context / 2 bytes."""
    half = context // 2
    was_training = model.training
    model.eval()
    # Each byte counts once, from the window that sees most before it.
    starts = list(range(0, max(len(held_out) - 1 - context, 0) + half, half))
    total = 0.0
    for i in range(0, len(starts), batch_size):
        for start, nats in _window_losses(model, held_out, starts[i : i + batch_size], context):
            total += (nats if start == 0 else nats[context - half :]).sum().item()
    model.train(was_training)
    return math.exp(total / (len(held_out) - 1))


def _window_losses(model, tokens, starts, context):
    """(start, nats [T]) of each window; the last one may be shorter and goes alone."""
    device = next(model.parameters()).device
    whole = [start for start in starts if start + context < len(tokens)]
    groups = [whole] if whole else []
    groups += [[start] for start in starts if start + context >= len(tokens)]
    for group in groups:
        stacked = torch.stack([tokens[s : s + context + 1] for s in group]).to(device)
        logits = model(stacked[:, :-1]).double()
        nats = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), stacked[:, 1:], reduction="none"
        )
        yield from zip(group, nats, strict=True)
