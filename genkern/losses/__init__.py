"""Losses for training generative models: `losses.hinge.d(real, fake)`, `losses.hinge.g(fake)`.

`real` and `fake` are the discriminator's logits: any shape (each its own, unless stated), dtype
float32, float64, bfloat16 or float16, on one device;
or lists of them, one a discriminator. A loss is a 0-dim tensor, float32 (float64 for float64
logits): means are taken in at least fp32, and gradients are multiplied by the incoming one in fp32
before they are rounded to the logits' dtype. Value, gradient and statistics come from one pass over
the logits.
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
from genkern.losses.penalties import r1

__all__ = [
    "AdversarialLoss",
    "CrossEntropyLoss",
    "LeastSquaresLoss",
    "LossStats",
    "RelativisticLoss",
    "auxiliary_classifier",
    "bcr",
    "cr",
    "feature_matching",
    "get",
    "hinge",
    "lsgan",
    "multi_hinge",
    "nonsaturating",
    "projection",
    "r1",
    "ragan",
    "rahinge",
    "rals",
    "rpgan",
    "saturating",
    "top_k",
    "wgan",
    "zcr",
]
