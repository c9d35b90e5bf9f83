"""f16 and bf16, alone and in pairs, by exact rational arithmetic."""

import math
from fractions import Fraction

import ptx_exact as exact
from ptx_conformance import Case
from ptx_float_cases import arithmetic, extreme, flushed


def paired(case, name):
    """A case of one element as the case of two: the same in both halves."""
    text = case.text.replace(f".{name} ", f".{name}x2 ")

    def expected(*operands):
        low = case.expected(*(o & 0xFFFF for o in operands))
        high = case.expected(*(o >> 16 for o in operands))
        # Any NaN: the two are compared apart only where both have a value.
        if low is None or high is None or exact.NAN in (low, high):
            return None
        return high << 16 | low

    kinds = tuple(
        [high << 16 | low for low, high in zip(kind, reversed(kind), strict=True)]
        if isinstance(kind, list)
        else _Pairs(kind)
        for kind in case.kinds
    )
    return Case(text, "b32", ("b32",) * len(kinds), kinds, expected)


class _Pairs(list):
    """Values to draw from: pairs of halves near one, with some special ones."""

    def __init__(self, name):
        import random

        from ptx_conformance import draws

        rng = random.Random(1)
        low, high = draws(name, 400, rng), draws(name, 400, rng)
        super().__init__(h << 16 | x for x, h in zip(low, high, strict=True))


def _add(a, b, mode):
    return exact.add(a, b, mode)


def _subtract(a, b, mode):
    return exact.add(a, exact.negate(b), mode)


def _multiply(a, b, mode):
    return exact.multiply(a, b)


def _fused(a, b, c, mode):
    return exact.add(exact.multiply(a, b), c, mode)


def _relu(name):
    (case,) = arithmetic("fma", 3, _fused, name, (".rn",))

    def expected(a, b, c):
        bits = case.expected(a, b, c)
        if bits == exact.NAN:
            return bits
        return 0 if exact.is_negative(exact.decode(bits, name)) else bits

    text = f"fma.rn.relu.{name} {{d}}, {{a}}, {{b}}, {{c}}"
    return Case(text, "b16", ("b16",) * 3, (name,) * 3, expected, name)


def _function(text, name, function):
    def expected(a):
        value = exact.decode(a, name)
        if not exact.is_finite(value):
            return None
        result = function(float(exact.number(value)))
        return exact.encode("inf" if math.isinf(result) else Fraction(result), name)

    ulp = 2.0 ** (1 - exact.FORMATS[name].digits)
    near = [exact.encode(Fraction(n, 37), name) for n in range(-200, 200, 3)]
    return Case(
        f"{text}.{name} {{d}}, {{a}}", "b16", ("b16",), (near,), expected, name, tolerance=ulp
    )


_SINGLE = [
    *((case, name) for name in ("f16", "bf16") for case in (
        *arithmetic("add", 2, _add, name, ("", ".rn")),
        *arithmetic("sub", 2, _subtract, name, ("", ".rn")),
        *arithmetic("mul", 2, _multiply, name, ("", ".rn")),
        *arithmetic("fma", 3, _fused, name, (".rn",)),
        _relu(name),
        *(extreme(op, name, sign, 2, m) for op, sign in (("min", -1), ("max", 1))
          for m in ("", ".NaN", ".xorsign.abs")),
        Case(f"neg.{name} {{d}}, {{a}}", "b16", ("b16",), (name,),
             lambda a, name=name: exact.NAN if exact.is_nan_bits(a, name) else a ^ 0x8000, name),
        Case(f"abs.{name} {{d}}, {{a}}", "b16", ("b16",), (name,),
             lambda a, name=name: exact.NAN if exact.is_nan_bits(a, name) else a & 0x7FFF, name),
    )),
    *((case, "f16") for case in arithmetic("add", 2, _add, "f16", ("",), flags=[".sat"])),
    *((case, "f16") for case in arithmetic("fma", 3, _fused, "f16", (".rn",), flags=[".sat"])),
]  # fmt: skip


def _flushed_f16():
    """add.ftz.f16: subnormal operands and results are zeros of their sign."""

    def expected(a, b):
        a, b = flushed(a, "f16"), flushed(b, "f16")
        bits = exact.encode(exact.add(exact.decode(a, "f16"), exact.decode(b, "f16")), "f16")
        return bits if bits == exact.NAN else flushed(bits, "f16")

    return Case("add.ftz.f16 {d}, {a}, {b}", "b16", ("b16", "b16"), ("f16", "f16"), expected, "f16")


def _halfway():
    """fma.rn.bf16 where the product lies halfway and only a tiny addend says which way."""
    (case,) = arithmetic("fma", 3, _fused, "bf16", (".rn",))
    tiny = [0x0D80, 0x8D80, 0x0001, 0x8001, 0x1234]
    case.kinds = ([0x3F81, 0x3F83, 0xBF81, 0xBF85], [0x3FC0], tiny)
    return case


_FUNCTIONS = [
    (_function("ex2.approx", "f16", lambda x: 2.0**x), "f16"),
    (_function("ex2.approx.ftz", "bf16", lambda x: 2.0**x), "bf16"),
    *((_function("tanh.approx", name, math.tanh), name) for name in ("f16", "bf16")),
]

CASES = [
    _halfway(),
    *(case for case, _ in _SINGLE),
    *(paired(case, name) for case, name in _SINGLE),
    _flushed_f16(),
    *(case for case, _ in _FUNCTIONS),
    *(paired(case, name) for case, name in _FUNCTIONS),
]
