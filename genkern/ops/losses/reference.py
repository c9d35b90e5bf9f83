"""What an adversarial loss means, in plain PyTorch: any dtype, any number of derivatives."""

import torch
import torch.nn.functional as F

PHI = {
    "softplus": lambda z: -F.logsigmoid(-z),  # F.softplus is the identity above 20
    "relu": F.relu,
    "square": lambda z: z * z,
    "identity": lambda z: z,
}


def adversarial_loss(form, real, fake):
    """w_r · mean φ(s_r·r + c_r) + w_f · mean φ(s_f·f + c_f); for a paired form
    w_r · mean φ(s_r·r + s_f·f + c_r). A side that is None has no part. Half precision is
    computed in fp32."""
    phi = PHI[form.phi]
    if form.paired:
        return form.real.weight * phi(_line(form.real, real) + form.fake.sign * _wide(fake)).mean()
    terms = [
        side.weight * phi(_line(side, logits)).mean()
        for side, logits in ((form.real, real), (form.fake, fake))
        if logits is not None
    ]
    return sum(terms[1:], terms[0])


def statistics(real, fake):
    """mean r, mean f, share of r > 0, share of f < 0; zero for a side that is None."""
    one = real if real is not None else fake
    zero = _wide(one).new_zeros(())
    r = _wide(real) if real is not None else None
    f = _wide(fake) if fake is not None else None
    values = (
        zero if r is None else r.mean(),
        zero if f is None else f.mean(),
        zero if r is None else (r > 0).to(zero.dtype).mean(),
        zero if f is None else (f < 0).to(zero.dtype).mean(),
    )
    return torch.stack(values).detach()


def _wide(x):
    return x.float() if x.element_size() < 4 else x


def _line(side, x):
    return side.sign * _wide(x) + side.shift
