"""One step of a GAN: the discriminator's, the generator's, and the average of the generator."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from genkern import losses
from genkern.nn.averaging import averaged


class GANStep(NamedTuple):
    """0-dim tensors, detached: read them when you log, so that a step waits for no device."""

    loss_g: Tensor
    loss_d: Tensor  # without the penalty
    penalty: Tensor  # 0 in a step that has none
    real_mean: Tensor
    fake_mean: Tensor
    real_accuracy: Tensor
    fake_accuracy: Tensor


class GANTrainer:
    """Trains a generator G(z, labels) against a discriminator D(images, labels).

        trainer = GANTrainer(G, D, loss="hinge", r1=0, ema=0.999)
        for real, labels in loader:
            step = trainer.step(real, labels)
        images = trainer.ema(z, labels)

    Args:
        G: any module: z [B, z_dim] and labels (as they came) to images. It keeps its train mode.
        D: any module: images and labels to logits of any shape. Without a penalty, or with a lazy
            one, it sees real and fake images as one batch of 2B (one power iteration of spectral
            norm instead of two); with a penalty in every step, as two batches.
        loss: a name for `genkern.losses.get`, or such a loss.
        r1: gamma of the R1 penalty, gamma/2 · mean over images of Σ (∂D/∂image)²; 0 for none.
        r1_every: k > 1 makes R1 lazy, as in StyleGAN2: every k-th step, beginning with the first, D
            takes a step more on k times the penalty alone, and its Adam, unless given, has the lr
            and betas that `losses.lazy` scales for that.
        ema: decay of the average of G, see `averaged`.
        lr_G, lr_D, betas, eps: of Adam, unless `opt_G` and `opt_D` are given. BigGAN's eps: with
            1e-8, Adam takes full steps along gradients that are nothing but rounding noise.
        z_dim: length of the noise; G.z_dim by default.

    The noise comes from torch's global generator. Raises ValueError, naming the argument, for a
    negative r1, an r1_every below 1 or a missing z_dim.
    """

    def __init__(
        self,
        G: nn.Module,
        D: nn.Module,
        *,
        loss="hinge",
        r1: float = 0.0,
        r1_every: int = 1,
        ema: float = 0.999,
        lr_G: float = 1e-3,
        lr_D: float = 2e-3,
        betas=(0.0, 0.9),
        eps: float = 1e-6,
        opt_G=None,
        opt_D=None,
        z_dim: int | None = None,
    ) -> None:
        if not r1 >= 0:
            raise ValueError(f"GANTrainer: r1 must be 0 or positive, not {r1}")
        if r1_every < 1:
            raise ValueError(f"GANTrainer: r1_every must be at least 1, not {r1_every}")
        z_dim = getattr(G, "z_dim", None) if z_dim is None else z_dim
        if z_dim is None:
            raise ValueError("GANTrainer: z_dim must be given, since G has no attribute z_dim")
        self.G, self.D, self.r1, self.z_dim = G, D, r1, z_dim
        self.loss = losses.get(loss) if isinstance(loss, str) else loss
        self.ema = averaged(G, ema)
        self.opt_G = opt_G or torch.optim.Adam(_trainable(G), lr_G, betas, eps)
        self.lazy_r1 = losses.lazy(r1_every) if r1 and r1_every > 1 else None
        adam_D = {"lr": lr_D, "betas": betas}
        if self.lazy_r1:
            adam_D = self.lazy_r1.adam(**adam_D)
        self.opt_D = opt_D or torch.optim.Adam(_trainable(D), eps=eps, **adam_D)
        self.steps = 0

    def step(self, real: Tensor, labels: Tensor | None = None) -> GANStep:
        """One update of D, one of G, one of the average, on a batch of real images."""
        loss_d, penalty, stats = self._step_d(real, labels)
        loss_g = self._step_g(real, labels)
        self.ema.update_parameters(self.G)
        self.steps += 1
        return GANStep(loss_g, loss_d, penalty, *stats)

    def _step_d(self, real, labels):
        with torch.no_grad():
            fake = self.G(self.noise(len(real)), labels)
        if self.r1 and not self.lazy_r1:
            real = real.detach().requires_grad_()
            real_logits, fake_logits = self.D(real, labels), self.D(fake, labels)
        else:
            both = None if labels is None else torch.cat([labels, labels])
            real_logits, fake_logits = self.D(torch.cat([real, fake]), both).chunk(2)
        loss, stats = self.loss.d(real_logits, fake_logits, stats=True)
        if self.r1 and not self.lazy_r1:
            penalty = losses.r1(real_logits, real, self.r1)
            self._descend(self.opt_D, loss + penalty)
            return loss.detach(), penalty.detach(), stats
        self._descend(self.opt_D, loss)
        if self.lazy_r1 and self.lazy_r1.due(self.steps):
            return loss.detach(), self._lazy_penalty(real, labels), stats
        return loss.detach(), torch.zeros_like(loss), stats

    def _lazy_penalty(self, real, labels):
        """A step of D on the penalty alone; returns the penalty unscaled."""
        real = real.detach().requires_grad_()
        penalty = losses.r1(self.D(real, labels), real, self.r1)
        self._descend(self.opt_D, self.lazy_r1.scaled(penalty))
        return penalty.detach()

    def _step_g(self, real, labels):
        fake_logits = self.D(self.G(self.noise(len(real)), labels), labels)
        real_logits = None
        if self.loss.needs_real:
            with torch.no_grad():
                real_logits = self.D(real, labels)
        loss = self.loss.g(fake_logits, real_logits)
        self._descend(self.opt_G, loss)
        return loss.detach()

    @staticmethod
    def _descend(optimizer, loss):
        optimizer.zero_grad()
        # Only the weights that this optimizer moves: the other model's gradients cost nothing.
        loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
        optimizer.step()

    def noise(self, n: int) -> Tensor:
        """z [n, z_dim], standard normal, in the generator's dtype and on its device."""
        like = next(self.G.parameters())
        return torch.randn(n, self.z_dim, dtype=like.dtype, device=like.device)

    @property
    def optimizers(self):
        return self.opt_G, self.opt_D

    def state_dict(self) -> dict:
        """All that a later process needs to go on, beside torch's random state and the data."""
        parts = {name: getattr(self, name).state_dict() for name in _PARTS}
        return {**parts, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.steps = state["steps"]


_PARTS = ("G", "D", "ema", "opt_G", "opt_D")


def _trainable(model):
    return [p for p in model.parameters() if p.requires_grad]
