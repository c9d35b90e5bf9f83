"""Lazy regularisation: a penalty computed only every few steps."""

from typing import NamedTuple


class lazy(NamedTuple("lazy", [("interval", int)])):
    """StyleGAN2's lazy regularisation (Karras et al. 2020, appendix B).

        every = losses.lazy(16)
        opt_D = torch.optim.Adam(D.parameters(), **every.adam(lr=0.002, betas=(0.0, 0.99)))
        …                                             # the step on the main loss
        if every.due(step):
            (every.interval * losses.r1(D(real), real, gamma=10)).backward()
            opt_D.step()

    The penalty, computed every `interval` steps in a step of its own, counts `interval` times. The
    optimizer then takes k + 1 steps where it took k: with c = k/(k+1) the learning rate becomes
    c · lr and each beta beta ** c.
    """

    __slots__ = ()

    def __new__(cls, interval):
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"losses.lazy: interval must be an integer above 0, not {interval!r}")
        return super().__new__(cls, interval)

    def due(self, step: int) -> bool:
        """Whether the penalty belongs to this step (counted from 0)."""
        return step % self.interval == 0

    def scaled(self, penalty):
        """The penalty times the interval."""
        return self.interval * penalty

    def adam(self, lr: float, betas=(0.9, 0.999)) -> dict:
        """Adam's `lr` and `betas`, scaled."""
        c = self.interval / (self.interval + 1)
        return {"lr": c * lr, "betas": tuple(beta**c for beta in betas)}
