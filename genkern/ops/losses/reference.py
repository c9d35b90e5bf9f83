"""What an adversarial loss means, in plain PyTorch: any dtype, any number of derivatives."""

import torch
import torch.nn.functional as F

PHI = {
    "softplus": lambda z: -F.logsigmoid(-z),  # F.softplus is the identity above 20
    "relu": F.relu,
    "square": lambda z: z * z,
    "identity": lambda z: z,
}


def adversarial_loss(form, reals, fakes, factor=1.0):
    """factor · Σ over discriminators of its term, by `form.pairing`:

        separate  w_r · mean(φ(s_r·r + c_r) + λ_r·r) + w_f · mean(φ(s_f·f + c_f) + λ_f·f)
        paired    w_r · mean φ(s_r·r + s_f·f + c_r)
        average   w_r · mean φ(s_r·(r - mean f) + c_r) + w_f · mean φ(s_f·(f - mean r) + c_f)

    `reals` and `fakes` are lists of logits; without `reals` that side has no part. Half precision
    is computed in fp32.
    """
    pairs = zip(reals or [None] * len(fakes), fakes, strict=True)
    terms = [_term(form, real, fake) for real, fake in pairs]
    return factor * sum(terms[1:], terms[0])


def _term(form, real, fake):
    phi = PHI[form.phi]
    fake = _wide(fake)
    if real is None:
        return _side(phi, form.fake, fake)
    real = _wide(real)
    if form.pairing == "paired":
        z = form.real.sign * real + form.fake.sign * fake + form.real.shift
        return form.real.weight * phi(z).mean()
    if form.pairing == "average":
        real, fake = real - fake.mean(), fake - real.mean()
    return _side(phi, form.real, real) + _side(phi, form.fake, fake)


def _side(phi, side, x):
    value = phi(side.sign * x + side.shift)
    return side.weight * (value + side.slope * x if side.slope else value).mean()


def statistics(form, reals, fakes):
    """[4, discriminators]: mean r, mean f, share of r > 0, share of f < 0 (the other way round
    where low logits mean real); zero for a side without a part."""
    zero = _wide(fakes[0]).new_zeros(())

    def row(side, statistic):
        return torch.stack([zero if x is None else statistic(_wide(x)).mean() for x in side])

    reals, towards = reals or [None] * len(fakes), form.orientation
    rows = (
        row(reals, lambda x: x),
        row(fakes, lambda x: x),
        row(reals, lambda x: (towards * x > 0).to(x)),
        row(fakes, lambda x: (towards * x < 0).to(x)),
    )
    return torch.stack(rows).detach()


def _wide(x):
    return x.float() if x.element_size() < 4 else x
