"""Losses for training generative models: `losses.hinge.d(real, fake)`, `losses.hinge.g(fake)`.

`real` and `fake` are the discriminator's logits: any shape (each its own, unless stated), dtype
float32, float64, bfloat16 or float16, on one device; or lists of them, one a discriminator. A loss
is a 0-dim tensor, float32 (float64 for float64 logits): means are taken in at least fp32, and
gradients are multiplied by the incoming one in fp32 before they are rounded to the logits' dtype.
Value, gradient and statistics come from one pass over the logits.
"""

from genkern.losses.adversarial import (
    AdversarialLoss,
    CrossEntropyLoss,
    LeastSquaresLoss,
    LossStats,
    RelativisticLoss,
    get,
    hinge,
    lsgan,
    nonsaturating,
    ragan,
    rahinge,
    rals,
    rpgan,
    saturating,
    wgan,
)
from genkern.losses.conditioning import auxiliary_classifier, multi_hinge, projection, top_k
from genkern.losses.consistency import bcr, cr, zcr
from genkern.losses.features import feature_matching
from genkern.losses.lazy import lazy
from genkern.losses.lecam import LeCam
from genkern.losses.likelihood import gaussian_kl, linear_cross_entropy
from genkern.losses.path_length import PathLength
from genkern.losses.penalties import dragan, max_gp, r1, r2, wgan_gp, zero_centered_gp

__all__ = [
    "AdversarialLoss",
    "CrossEntropyLoss",
    "LeCam",
    "LeastSquaresLoss",
    "LossStats",
    "PathLength",
    "RelativisticLoss",
    "auxiliary_classifier",
    "bcr",
    "cr",
    "dragan",
    "feature_matching",
    "gaussian_kl",
    "get",
    "hinge",
    "lazy",
    "linear_cross_entropy",
    "lsgan",
    "max_gp",
    "multi_hinge",
    "nonsaturating",
    "projection",
    "r1",
    "r2",
    "ragan",
    "rahinge",
    "rals",
    "rpgan",
    "saturating",
    "top_k",
    "wgan",
    "wgan_gp",
    "zcr",
    "zero_centered_gp",
]
