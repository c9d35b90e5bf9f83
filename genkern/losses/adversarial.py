"""The adversarial losses, each a pair: `d(real, fake)` and `g(fake)`."""

from typing import NamedTuple

from torch import Tensor

from genkern.ops.losses.op import Form, Side, adversarial_loss


class LossStats(NamedTuple):
    """Of the logits that went in, detached, on their device: 0 for a side that did not."""

    real_mean: Tensor
    fake_mean: Tensor
    real_accuracy: Tensor  # share of real logits above 0
    fake_accuracy: Tensor  # share of fake logits below 0


def _call(form, real, fake, stats):
    result = adversarial_loss(form, real, fake, stats)
    return (result[0], LossStats(*result[1].unbind())) if stats else result


class AdversarialLoss:
    """A pair of losses: `d(real, fake)` for the discriminator, `g(fake)` for the generator.

    With `stats=True` each returns `(loss, LossStats)`. Raises TypeError or ValueError, naming the
    argument, for integer or differing dtypes and for differing devices.
    """

    def __init__(self, name, discriminator, generator, doc):
        self.name = name
        self.__doc__ = doc
        self._discriminator, self._generator = discriminator, generator

    def __repr__(self):
        return f"genkern.losses.{self.name}"

    def d(self, real, fake, *, stats=False):
        """The discriminator's loss of logits `real` and `fake`."""
        return _call(self._discriminator, real, fake, stats)

    def g(self, fake, real=None, *, stats=False):
        """The generator's loss of logits `fake`. Only relativistic losses look at `real`."""
        return _call(self._generator, None, fake, stats)


class RelativisticLoss(AdversarialLoss):
    """Like `AdversarialLoss`; real and fake logits go in pairs and have one shape."""

    def g(self, fake, real=None, *, stats=False):
        """The generator's loss; `real` are the logits of as many real samples."""
        if real is None:
            raise TypeError(f"losses.{self.name}.g: real must be given, this loss compares pairs")
        return _call(self._generator, real, fake, stats)


class LeastSquaresLoss(AdversarialLoss):
    """½·mean (r - b)² + ½·mean (f - a)²  and  ½·mean (f - c)²

    with a = `fake_label` 0, b = `real_label` 1, c = `target` 1 and ½ = `factor` (Mao et al. 2017,
    eq. 9; many codebases leave the ½ out: factor=1).
    """

    def __init__(self, name):
        self.name = name

    def d(self, real, fake, *, real_label=1.0, fake_label=0.0, factor=0.5, stats=False):
        """factor·mean (r - real_label)² + factor·mean (f - fake_label)²"""
        return _call(_squares(-real_label, -fake_label, factor), real, fake, stats)

    def g(self, fake, real=None, *, target=1.0, factor=0.5, stats=False):
        """factor·mean (f - target)²"""
        return _call(_squares(0.0, -target, factor), None, fake, stats)


def _squares(real_shift, fake_shift, factor):
    return Form("square", Side(1.0, real_shift, factor), Side(1.0, fake_shift, factor))


nonsaturating = AdversarialLoss(
    "nonsaturating",
    Form("softplus", Side(-1.0), Side(1.0)),
    Form("softplus", fake=Side(-1.0)),
    """mean softplus(-r) + mean softplus(f)  and  mean softplus(-f)

    The original GAN's losses with the generator's non-saturating form (Goodfellow et al. 2014,
    section 3), written on logits; also called vanilla and logistic (StyleGAN).""",
)

hinge = AdversarialLoss(
    "hinge",
    Form("relu", Side(-1.0, 1.0), Side(1.0, 1.0)),
    Form("identity", fake=Side(-1.0)),
    """mean max(0, 1 - r) + mean max(0, 1 + f)  and  -mean f

    Lim & Ye 2017; Miyato et al. 2018 (SNGAN, eqs. 16, 17); no factor ½.""",
)

wgan = AdversarialLoss(
    "wgan",
    Form("identity", Side(-1.0), Side(1.0)),
    Form("identity", fake=Side(-1.0)),
    """mean f - mean r  and  -mean f

    Arjovsky et al. 2017, algorithm 1; the critic minimises.""",
)

lsgan = LeastSquaresLoss("lsgan")

rpgan = RelativisticLoss(
    "rpgan",
    Form("softplus", Side(-1.0), Side(1.0), paired=True),
    Form("softplus", Side(1.0), Side(-1.0), paired=True),
    """mean softplus(-(r - f))  and  mean softplus(-(f - r))

    The relativistic pairing loss (Jolicoeur-Martineau 2018; R3GAN, Huang et al. 2024).""",
)

_BY_NAME = {loss.name: loss for loss in (nonsaturating, hinge, wgan, lsgan, rpgan)}
_BY_NAME |= {"vanilla": nonsaturating, "logistic": nonsaturating, "wasserstein": wgan}


def get(name):
    """The loss named "hinge", "lsgan", "nonsaturating" (also "vanilla", "logistic"), "rpgan" or
    "wgan" (also "wasserstein"). Raises ValueError for another name."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise ValueError(
            f"there is no loss {name!r}; there are {', '.join(sorted(_BY_NAME))}"
        ) from None
