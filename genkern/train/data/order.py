"""In which order data is seen: shuffled anew each epoch, and continued exactly after a restart."""

import torch
from torch import Tensor


class Shuffled:
    """Endless batches of indices below `items`: every epoch is a permutation that depends on
    (seed, epoch) alone, so two integers say where a run stands. A last, smaller batch is dropped;
    there is always at least one batch an epoch."""

    def __init__(self, items: int, batch_size: int, seed: int) -> None:
        self.items, self.batch_size, self.seed = items, min(batch_size, items), seed
        self.epoch, self.position = 0, 0
        self._order = self._permutation()

    def next(self) -> Tensor:
        if self.position + self.batch_size > self.items:
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._permutation()
        batch = self._order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return batch

    def generator(self) -> torch.Generator:
        """This epoch's own source of randomness."""
        return torch.Generator().manual_seed((self.seed << 24) + self.epoch)

    def _permutation(self):
        return torch.randperm(self.items, generator=self.generator())

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._permutation()
