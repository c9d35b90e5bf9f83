"""Feature matching: a discriminator's feature maps of fake samples against those of real ones."""

from torch import Tensor

from genkern.ops.differences.op import differences

REDUCTIONS = ("sum", "mean")


def feature_matching(
    real,
    fake,
    *,
    factor=2.0,
    reduction="sum",
    layer_reduction="sum",
    distance="absolute",
    detach_real=True,
):
    """factor · Σ over discriminators, Σ over their layers of mean |real - fake|, a 0-dim tensor.

    real, fake: lists by discriminator of lists by layer of feature maps, as they are: any shapes,
    the same on both sides; or the list of one discriminator's feature maps. float32, float64,
    bfloat16 or float16, on one device. The result is float32 (float64 for float64).

    reduction: "sum" over the discriminators, or "mean". layer_reduction: the same over the layers
    of each. distance: "absolute" (L1), or "square" (mean squared difference). detach_real: whether
    the real maps are a constant; with False their gradients flow too.

    The defaults are HiFi-GAN's (Kong et al. 2020, eq. 8; its code's factor 2; it does not detach,
    which makes no difference to a generator). MelGAN's and pix2pixHD's is factor=10 · 4 with
    reduction="mean" and layer_reduction="mean" (their 4 / (layers + 1) over layers + 1 maps; they
    leave out the last one, the logits, and detach). Salimans et al. 2016 (section 3.1) match the
    batch's mean features by L2: pass those, with distance="square".

    Raises TypeError or ValueError, naming the map, for lists of different lengths, and for
    different shapes, dtypes or devices.
    """
    for name, value in (("reduction", reduction), ("layer_reduction", layer_reduction)):
        if value not in REDUCTIONS:
            raise ValueError(
                f'losses.feature_matching: {name} must be "sum" or "mean", not {value!r}'
            )
    real, fake = _by_discriminator("real", real), _by_discriminator("fake", fake)
    if len(real) != len(fake):
        raise ValueError(
            f"losses.feature_matching: real and fake must hold the maps of as many discriminators, "
            f"not of {len(real)} and {len(fake)}"
        )
    names, reals, fakes, weights = [], [], [], []
    for k, (of_real, of_fake) in enumerate(zip(real, fake, strict=True)):
        if len(of_real) != len(of_fake) or not len(of_real):
            raise ValueError(
                f"losses.feature_matching: real[{k}] and fake[{k}] must hold as many feature maps, "
                f"at least one, not {len(of_real)} and {len(of_fake)}"
            )
        weight = factor / (len(real) if reduction == "mean" else 1)
        weight /= len(of_real) if layer_reduction == "mean" else 1
        names += [(f"real[{k}][{i}]", f"fake[{k}][{i}]") for i in range(len(of_real))]
        reals += [_detached(x) for x in of_real] if detach_real else of_real
        fakes += of_fake
        weights += [weight] * len(of_real)
    return differences(names, reals, fakes, distance, weights)


def _by_discriminator(name, maps):
    """A list of lists; of one discriminator's list a list of one."""
    if not isinstance(maps, (list, tuple)) or not maps:
        raise TypeError(
            f"losses.feature_matching: {name} must be a list of lists of feature maps, not "
            f"{'an empty list' if isinstance(maps, (list, tuple)) else type(maps).__name__}"
        )
    return maps if isinstance(maps[0], (list, tuple)) else [maps]


def _detached(x):
    return x.detach() if isinstance(x, Tensor) else x
