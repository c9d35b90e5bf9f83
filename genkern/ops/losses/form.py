"""The form of an adversarial loss: everything about it but the logits."""

from typing import NamedTuple

from genkern._native import native

PHI_NUMBER = {"softplus": 0, "relu": 1, "square": 2, "identity": 3}
PAIRING_NUMBER = {"separate": 0, "paired": 1, "average": 2}


class Side(NamedTuple):
    """weight · mean(φ(sign · logit + shift) + slope · logit)"""

    sign: float = 1.0
    shift: float = 0.0
    weight: float = 1.0
    slope: float = 0.0


class Form:
    """A loss: φ by name, one `Side` each for real and fake logits, and how they meet: "separate",
    "paired" (the real side's line takes both), or "average" (each against the other's mean)."""

    __slots__ = ("_native", "fake", "orientation", "pairing", "phi", "real")

    def __init__(self, phi, real=None, fake=None, pairing="separate", orientation=1.0):
        self.phi, self.pairing, self.orientation = phi, pairing, orientation
        self.real, self.fake = real or Side(), fake or Side()
        self._native = None

    def inverted(self):
        """The same loss of the negated logits, for discriminators whose low logits mean real."""
        real, fake = (
            side._replace(sign=-side.sign, slope=-side.slope) for side in (self.real, self.fake)
        )
        return Form(self.phi, real, fake, self.pairing, -self.orientation)

    def native(self):
        """The kernels' own."""
        if self._native is None:
            self._native = native.AdversarialForm(
                PHI_NUMBER[self.phi],
                PAIRING_NUMBER[self.pairing],
                self.orientation,
                self.real,
                self.fake,
            )
        return self._native

    def constants(self):
        """What `form_of` makes it from again: strings and numbers, as torch.library knows."""
        return self.phi, self.pairing, [self.orientation, *self.real, *self.fake]


def form_of(phi, pairing, numbers):
    return Form(phi, Side(*numbers[1:5]), Side(*numbers[5:]), pairing, numbers[0])
