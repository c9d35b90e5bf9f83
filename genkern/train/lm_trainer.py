"""One step of a language model: predict every token from those before it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LMStep(NamedTuple):
    """0-dim tensors, detached."""

    loss: Tensor  # mean cross-entropy, in nats a token
    gradient_norm: Tensor  # before clipping


class LMTrainer:
    """Trains a causal model(tokens [B, T] int64) -> logits [B, T, V].

        trainer = LMTrainer(model, lr=1e-3)
        for tokens in loader:
            step = trainer.step(tokens)

    Args:
        model: any module of that form.
        lr, betas, weight_decay: of AdamW, unless `optimizer` is given. Only matrices decay, vectors
            (gains and biases) don't.
        clip: largest norm of the whole gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        betas=(0.9, 0.99),
        weight_decay: float = 0.1,
        clip: float = 1.0,
        optimizer=None,
    ) -> None:
        self.model, self.clip = model, clip
        self.optimizer = optimizer or torch.optim.AdamW(
            _groups(model, weight_decay), lr=lr, betas=betas
        )
        self.steps = 0

    def step(self, tokens: Tensor) -> LMStep:
        """One update on tokens [B, T + 1]: the first T are seen, the last T are predicted."""
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.steps += 1
        return LMStep(loss.detach(), norm.detach())

    @property
    def optimizers(self):
        return (self.optimizer,)

    def state_dict(self) -> dict:
        """All that a later process needs to go on, beside torch's random state and the data."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


def _groups(model, weight_decay):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
