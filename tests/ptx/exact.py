"""Floating-point formats by exact rational arithmetic: what any correct executor must give.

Values are Fractions, or the strings "nan", "inf", "-inf", "-0" where no Fraction can say it.
"""

import math
from fractions import Fraction
from typing import NamedTuple


class Format(NamedTuple):
    bits: int
    digits: int  # of the significand, the hidden one too
    least: int  # exponent of the smallest normal number
    greatest: int

    @property
    def mantissa(self):
        return self.digits - 1

    @property
    def infinity(self):
        return (self.greatest - self.least + 2) << self.mantissa

    @property
    def sign(self):
        return 1 << (self.bits - 1)


FORMATS = {
    "f16": Format(16, 11, -14, 15),
    "bf16": Format(16, 8, -126, 127),
    "f32": Format(32, 24, -126, 127),
    "f64": Format(64, 53, -1022, 1023),
}


def decode(bits, name):
    """The value of some bits."""
    form = FORMATS[name]
    negative, rest = bool(bits & form.sign), bits & (form.sign - 1)
    if rest > form.infinity:
        return "nan"
    if rest == form.infinity:
        return "-inf" if negative else "inf"
    exponent, mantissa = rest >> form.mantissa, rest & ((1 << form.mantissa) - 1)
    if exponent:
        mantissa |= 1 << form.mantissa
    value = Fraction(mantissa) * Fraction(2) ** (max(exponent, 1) - 1 + form.least - form.mantissa)
    if value == 0:
        return "-0" if negative else Fraction(0)
    return -value if negative else value


def number(value):
    return Fraction(0) if value == "-0" else value


def is_finite(value):
    return value == "-0" or isinstance(value, Fraction)


def encode(value, name, mode="rn"):
    """The bits of a value, rounded to the format in a direction: rn, rz, rm (down), rp (up)."""
    form = FORMATS[name]
    if value == "nan":
        return NAN
    if value in ("inf", "-inf"):
        return form.infinity | (form.sign if value == "-inf" else 0)
    if value == "-0":
        return form.sign
    negative = value < 0
    magnitude = abs(value)
    if magnitude == 0:
        return 0
    exponent = _exponent(magnitude)
    unit = Fraction(2) ** (max(exponent, form.least) - form.mantissa)
    steps = magnitude / unit
    whole = math.floor(steps)
    rest = steps - whole
    half = Fraction(1, 2)
    away = {
        "rn": rest > half or (rest == half and whole % 2 == 1),
        "rna": rest >= half,
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[mode]
    whole += away
    rounded = whole * unit
    bits = form.sign if negative else 0
    if rounded == 0:
        return bits
    exponent = _exponent(rounded)
    if exponent > form.greatest:
        stays = mode == "rz" or (mode == "rm" and not negative) or (mode == "rp" and negative)
        return bits | (form.infinity - (1 if stays else 0))
    if exponent < form.least:
        return bits | int(rounded / Fraction(2) ** (form.least - form.mantissa))
    mantissa = int(rounded / Fraction(2) ** (exponent - form.mantissa)) - (1 << form.mantissa)
    return bits | (exponent - form.least + 1) << form.mantissa | mantissa


NAN = "nan"  # in the place of bits: any NaN will do


def is_nan_bits(bits, name):
    form = FORMATS[name]
    return (bits & (form.sign - 1)) > form.infinity


def _exponent(magnitude):
    """e with 2^e <= magnitude < 2^(e + 1)."""
    guess = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return guess if Fraction(2) ** guess <= magnitude else guess - 1


def signed_zero(negative):
    return "-0" if negative else Fraction(0)


def is_negative(value):
    return value in ("-0", "-inf") or (isinstance(value, Fraction) and value < 0)


def add(a, b, mode="rn"):
    """a + b as IEEE 754 says, exact."""
    if "nan" in (a, b) or {a, b} == {"inf", "-inf"}:
        return "nan"
    for x in (a, b):
        if x in ("inf", "-inf"):
            return x
    total = number(a) + number(b)
    if total == 0:
        if is_negative(a) and is_negative(b):
            return "-0"
        if is_negative(a) != is_negative(b) or number(a) != 0:
            return signed_zero(mode == "rm")
        return Fraction(0)
    return total


def multiply(a, b):
    if "nan" in (a, b):
        return "nan"
    negative = is_negative(a) != is_negative(b)
    infinite = [x for x in (a, b) if x in ("inf", "-inf")]
    if infinite:
        if 0 in (_zero(a), _zero(b)):
            return "nan"
        return "-inf" if negative else "inf"
    product = number(a) * number(b)
    return product if product else signed_zero(negative)


def divide(a, b):
    if "nan" in (a, b) or (not is_finite(a) and not is_finite(b)):
        return "nan"
    negative = is_negative(a) != is_negative(b)
    if not is_finite(a) or (_zero(b) == 0 and _zero(a) != 0):
        return "-inf" if negative else "inf"
    if not is_finite(b):
        return signed_zero(negative)
    if _zero(b) == 0:
        return "nan"
    quotient = number(a) / number(b)
    return quotient if quotient else signed_zero(negative)


def _zero(value):
    return 0 if is_finite(value) and number(value) == 0 else 1


def negate(a):
    if a in ("inf", "-inf"):
        return "-inf" if a == "inf" else "inf"
    if a == "nan":
        return a
    if a == "-0":
        return Fraction(0)
    return -a if a else "-0"
