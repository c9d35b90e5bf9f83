"""The adversarial losses, each a pair: `d(real, fake)` and `g(fake)`."""

from typing import NamedTuple

from torch import Tensor

from genkern.ops.losses.form import Form, Side
from genkern.ops.losses.op import adversarial_loss


class LossStats(NamedTuple):
    """Of the logits that went in, detached, on their device: 0 for a side that did not. Each is
    0-dim, or [discriminators] where lists went in."""

    real_mean: Tensor
    fake_mean: Tensor
    real_accuracy: Tensor  # share of real logits above 0 (below, where sign=-1)
    fake_accuracy: Tensor  # share of fake logits below 0 (above, where sign=-1)


def _call(form, real, fake, factor, sign, reduction, stats):
    if sign == 1 and not stats:
        return adversarial_loss(form, real, fake, factor, reduction)
    if sign != 1:
        if sign != -1:
            raise ValueError(f"losses: sign must be 1 or -1, not {sign!r}")
        form = form.inverted()
    if not stats:
        return adversarial_loss(form, real, fake, factor, reduction)
    loss, statistics = adversarial_loss(form, real, fake, factor, reduction, True)
    return loss, LossStats(*statistics.unbind())


class AdversarialLoss:
    """A pair of losses: `d(real, fake)` for the discriminator, `g(fake)` for the generator.

    `real` and `fake` are a discriminator's logits, or lists of the logits of several
    discriminators, ragged as they are: one call, whose losses `reduction` adds up ("sum", as
    HiFi-GAN, MelGAN and pix2pixHD do) or averages ("mean").

    Every loss takes `factor`, which multiplies it (the paper's by default), and `sign`: 1, or -1
    for a discriminator whose low logits mean real. With `stats=True` it returns `(loss,
    LossStats)`. Raises TypeError or ValueError, naming the argument, for integer or differing
    dtypes, differing devices, and lists of different lengths.
    """

    needs_real = False  # whether g looks at the logits of real samples

    def __init__(self, name, discriminator, generator, doc):
        self.name = name
        self.__doc__ = doc
        self._discriminator, self._generator = discriminator, generator

    def __repr__(self):
        return f"genkern.losses.{self.name}"

    def d(self, real, fake, *, factor=1.0, sign=1, reduction="sum", stats=False):
        """The discriminator's loss of logits `real` and `fake`."""
        return _call(self._discriminator, real, fake, factor, sign, reduction, stats)

    def g(self, fake, real=None, *, factor=1.0, sign=1, reduction="sum", stats=False):
        """The generator's loss of logits `fake`. Only relativistic losses look at `real`."""
        return _call(self._generator, None, fake, factor, sign, reduction, stats)


class RelativisticLoss(AdversarialLoss):
    """Like `AdversarialLoss`, but the generator's loss needs the logits of real samples too: the
    two are compared in pairs (one shape), or each side with the mean of the other."""

    needs_real = True

    def g(self, fake, real=None, *, factor=1.0, sign=1, reduction="sum", stats=False):
        """The generator's loss; `real` are the logits of real samples."""
        if real is None:
            what = "pairs" if self._generator.pairing == "paired" else "with the other side's mean"
            raise TypeError(f"losses.{self.name}.g: real must be given, this loss compares {what}")
        return _call(self._generator, real, fake, factor, sign, reduction, stats)


class CrossEntropyLoss(AdversarialLoss):
    """Like `AdversarialLoss`, with targets other than 1 and 0 (label smoothing)."""

    def d(
        self,
        real,
        fake,
        *,
        real_target=1.0,
        fake_target=0.0,
        factor=1.0,
        sign=1,
        reduction="sum",
        stats=False,
    ):
        """The binary cross-entropy of real logits with `real_target` and of fake logits with
        `fake_target`: at 1 and 0 mean softplus(-r) + mean softplus(f). One-sided label smoothing is
        real_target=0.9 (Salimans et al. 2016, section 3.4)."""
        form = self._discriminator
        if real_target != 1 or fake_target != 0:
            # BCE with target t: softplus(-x) + (1 - t)·x = softplus(x) - t·x
            real_side = Side(-1.0, slope=1.0 - real_target)
            form = Form("softplus", real_side, Side(1.0, slope=-float(fake_target)))
        return _call(form, real, fake, factor, sign, reduction, stats)


class LeastSquaresLoss(AdversarialLoss):
    """½·mean (r - b)² + ½·mean (f - a)²  and  ½·mean (f - c)²

    with a = `fake_label` 0, b = `real_label` 1, c = `target` 1 and ½ = `factor` (Mao et al. 2017,
    eqs. 2 and 9; HiFi-GAN, CycleGAN and many others leave the ½ out: factor=1).
    """

    def __init__(self, name):
        super().__init__(name, _squares(-1.0, 0.0), _squares(0.0, -1.0), type(self).__doc__)

    def d(
        self,
        real,
        fake,
        *,
        real_label=1.0,
        fake_label=0.0,
        factor=0.5,
        sign=1,
        reduction="sum",
        stats=False,
    ):
        """factor·mean (r - real_label)² + factor·mean (f - fake_label)²"""
        form = self._discriminator
        if real_label != 1 or fake_label != 0:
            form = _squares(-float(real_label), -float(fake_label))
        return _call(form, real, fake, factor, sign, reduction, stats)

    def g(self, fake, real=None, *, target=1.0, factor=0.5, sign=1, reduction="sum", stats=False):
        """factor·mean (f - target)²"""
        form = self._generator if target == 1 else _squares(0.0, -float(target))
        return _call(form, None, fake, factor, sign, reduction, stats)


def _squares(real_shift, fake_shift):
    return Form("square", Side(1.0, real_shift), Side(1.0, fake_shift))


nonsaturating = CrossEntropyLoss(
    "nonsaturating",
    Form("softplus", Side(-1.0), Side(1.0)),
    Form("softplus", fake=Side(-1.0)),
    """mean softplus(-r) + mean softplus(f)  and  mean softplus(-f)

    The original GAN's losses with the generator's non-saturating form (Goodfellow et al. 2014,
    section 3), written on logits; also called vanilla and logistic (StyleGAN). `d` takes
    real_target and fake_target for label smoothing.""",
)

saturating = CrossEntropyLoss(
    "saturating",
    nonsaturating._discriminator,
    Form("softplus", fake=Side(1.0, weight=-1.0)),
    """mean softplus(-r) + mean softplus(f)  and  -mean softplus(f)

    The minimax game as it stands (Goodfellow et al. 2014, eq. 1), written on logits; also called
    minimax. `d` takes real_target and fake_target for label smoothing.""",
)

hinge = AdversarialLoss(
    "hinge",
    Form("relu", Side(-1.0, 1.0), Side(1.0, 1.0)),
    Form("identity", fake=Side(-1.0)),
    """mean max(0, 1 - r) + mean max(0, 1 + f)  and  -mean f

    Lim & Ye 2017; Miyato et al. 2018 (SNGAN, eqs. 16, 17); no factor ½ (taming-transformers'
    discriminator has it: factor=0.5).""",
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
    Form("softplus", Side(-1.0), Side(1.0), "paired"),
    Form("softplus", Side(1.0), Side(-1.0), "paired"),
    """mean softplus(-(r - f))  and  mean softplus(-(f - r))

    The relativistic pairing loss (Jolicoeur-Martineau 2018; R3GAN, Huang et al. 2024).""",
)

ragan = RelativisticLoss(
    "ragan",
    Form("softplus", Side(-1.0), Side(1.0), "average"),
    Form("softplus", Side(1.0), Side(-1.0), "average"),
    """mean softplus(-(r - mean f)) + mean softplus(f - mean r)  and the same with r and f swapped

    The relativistic average GAN (Jolicoeur-Martineau 2018, eqs. 10, 11); its author's code and
    ESRGAN take half of it: factor=0.5.""",
)

rahinge = RelativisticLoss(
    "rahinge",
    Form("relu", Side(-1.0, 1.0), Side(1.0, 1.0), "average"),
    Form("relu", Side(1.0, 1.0), Side(-1.0, 1.0), "average"),
    """mean max(0, 1 - (r - mean f)) + mean max(0, 1 + (f - mean r))  and swapped

    RaHingeGAN (Jolicoeur-Martineau 2018, appendix); its author's code takes half: factor=0.5.""",
)

rals = RelativisticLoss(
    "rals",
    Form("square", Side(1.0, -1.0), Side(1.0, 1.0), "average"),
    Form("square", Side(1.0, 1.0), Side(1.0, -1.0), "average"),
    """mean (r - mean f - 1)² + mean (f - mean r + 1)²  and  swapped

    RaLSGAN (Jolicoeur-Martineau 2018, appendix); its author's code takes half: factor=0.5.""",
)

_ALL = (nonsaturating, saturating, hinge, wgan, lsgan, rpgan, ragan, rahinge, rals)
_BY_NAME = {loss.name: loss for loss in _ALL}
NAMES = tuple(_BY_NAME)
_BY_NAME |= {
    "vanilla": nonsaturating,
    "logistic": nonsaturating,
    "minimax": saturating,
    "wasserstein": wgan,
}


def get(name):
    """The loss of that name: "hinge", "lsgan", "nonsaturating" (also "vanilla", "logistic"),
    "ragan", "rahinge", "rals", "rpgan", "saturating" (also "minimax") or "wgan" (also
    "wasserstein"). Raises ValueError for another name."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise ValueError(
            f"there is no loss {name!r}; there are {', '.join(sorted(_BY_NAME))}"
        ) from None
