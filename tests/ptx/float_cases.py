"""f32 and f64, by exact rational arithmetic."""

import functools
import math
import random
from fractions import Fraction

import ptx_exact as exact
from ptx_conformance import Case, draws

_REGISTER = {"f32": "b32", "f64": "b64", "f16": "b16", "bf16": "b16"}


def flushed(bits, name):
    """A subnormal f32 as the zero of its sign."""
    form = exact.FORMATS[name]
    return bits if bits & form.infinity else bits & form.sign


def _saturated(bits, name):
    if bits == exact.NAN:
        return 0
    value = exact.decode(bits, name)
    if value == "inf" or (exact.is_finite(value) and exact.number(value) > 1):
        return exact.encode(Fraction(1), name)
    return 0 if exact.is_negative(value) else bits


def arithmetic(
    opcode, count, compute, name="f32", rounds=("", ".rn", ".rz", ".rm", ".rp"), flags=()
):
    """Cases of one operation in every rounding; flags: sets of .ftz and .sat to try."""
    for flag in ("", *flags):
        for mode in rounds:
            yield _one(opcode, count, compute, name, mode, flag)


def _one(opcode, count, compute, name, mode, flag):
    direction = mode.strip(".") or "rn"

    def expected(*operands):
        if ".ftz" in flag:
            operands = [flushed(o, name) for o in operands]
        value = compute(*(exact.decode(o, name) for o in operands), direction)
        bits = exact.encode(value, name, direction)
        if ".ftz" in flag and bits != exact.NAN:
            # The hardware flushes what is below the least normal number before rounding; a value
            # that rounds up to it is left open.
            small = exact.is_finite(value) and 0 < abs(exact.number(value)) < Fraction(2) ** -126
            if small and bits & exact.FORMATS[name].infinity:
                return None
            bits = flushed(bits, name)
        return _saturated(bits, name) if ".sat" in flag else bits

    names = ", ".join(f"{{{letter}}}" for letter in "abc"[:count])
    register = _REGISTER[name]
    text = f"{opcode}{mode}{flag}.{name} {{d}}, {names}"
    return Case(text, register, (register,) * count, (name,) * count, expected, name)


def _add(a, b, mode):
    return exact.add(a, b, mode)


def _subtract(a, b, mode):
    return exact.add(a, exact.negate(b), mode)


def _multiply(a, b, mode):
    return exact.multiply(a, b)


def _fused(a, b, c, mode):
    return exact.add(exact.multiply(a, b), c, mode)


def _divide(a, b, mode):
    return exact.divide(a, b)


def _reciprocal(a, mode):
    return exact.divide(Fraction(1), a)


def _root(a, mode):
    """The root to 300 bits, with a sticky one below."""
    if a in ("nan", "-inf") or (exact.is_negative(a) and a != "-0"):
        return "nan"
    if not exact.is_finite(a) or exact.number(a) == 0:
        return a
    scale = 1 << 2400
    product = a.numerator * scale // a.denominator
    root = math.isqrt(product)
    sticky = root * root != product or a.numerator * scale % a.denominator != 0
    return Fraction(2 * root + sticky, 2 << 1200)


def _order(a, b):
    """-1, 0 or 1; None where one is NaN."""
    if "nan" in (a, b):
        return None
    places = {"-inf": -math.inf, "inf": math.inf}
    x, y = (places.get(v, exact.number(v) if v not in places else 0) for v in (a, b))
    return (x > y) - (x < y)


def extreme(opcode, name, sign, count=2, modifiers=""):
    """min (sign -1) or max (1): a NaN loses unless .NaN, -0 lies below +0."""
    form = exact.FORMATS[name]

    def pick(a, b):
        if exact.is_nan_bits(a, name) or exact.is_nan_bits(b, name):
            nan, other = (a, b) if exact.is_nan_bits(a, name) else (b, a)
            return nan if ".NaN" in modifiers else other
        order = _order(exact.decode(a, name), exact.decode(b, name))
        if order == 0:  # equal, or zeros of two signs
            return a | b if sign < 0 else a & b
        return a if order == sign else b

    def expected(*operands):
        if ".ftz" in modifiers:
            operands = [flushed(o, name) for o in operands]
        flip = 0
        if ".xorsign.abs" in modifiers:
            flip = (operands[0] ^ operands[1]) & form.sign
        if ".abs" in modifiers:
            operands = [o & ~form.sign for o in operands]
        result = functools.reduce(pick, operands)
        return exact.NAN if exact.is_nan_bits(result, name) else result ^ flip

    register = _REGISTER[name]
    names = ", ".join(f"{{{letter}}}" for letter in "abc"[:count])
    text = f"{opcode}{modifiers}.{name} {{d}}, {names}"
    return Case(text, register, (register,) * count, (name,) * count, expected, name)


def _of_zeros(opcode, name, sign):
    """min and max of zeros of both signs, which random draws seldom bring together."""
    case = extreme(opcode, name, sign)
    case.kinds = ([0, exact.FORMATS[name].sign],) * 2
    return case


def _approximate(text, function, domain, tolerance=2**-22):
    def expected(a):
        value = exact.decode(flushed(a, "f32") if ".ftz" in text else a, "f32")
        # An infinity, or a zero that stands for a subnormal, has no logarithm and no inverse.
        if not exact.is_finite(value) or (exact.number(value) == 0 and a & 0x7FFFFFFF):
            return None
        result = function(float(exact.number(value)))
        if math.isinf(result):
            return exact.encode("inf" if result > 0 else "-inf", "f32")
        bits = exact.encode(Fraction(result), "f32")
        return flushed(bits, "f32") if ".ftz" in text else bits

    return Case(
        f"{text}.f32 {{d}}, {{a}}", "b32", ("b32",), (domain,), expected, "f32", tolerance=tolerance
    )


def _bits(*values):
    return [exact.encode(Fraction(v), "f32") for v in values]


_WIDE = _bits(
    *(n / 7 for n in range(-700, 700, 13)), 1, 0.5, 2, 1e-30, 1e30, 3e38, -126.5, -130, -149, 1e-39
)
_POSITIVE = [b for b in _WIDE if not b >> 31 and b]
_SMALL = _bits(*(n / 97 for n in range(-300, 300, 7)), 1e-20)

_F32 = [".ftz", ".sat", ".ftz.sat"]


def _sign_bit(opcode, name, function):
    register = _REGISTER[name]
    return Case(
        f"{opcode}.{name} {{d}}, {{a}}",
        register,
        (register,),
        (name,),
        lambda a: (
            exact.NAN if exact.is_nan_bits(a, name) else function(a, exact.FORMATS[name].sign)
        ),
        name,
    )


def paired(opcode, count, compute, mode="", flag=""):
    """Two floats in a 64-bit register, each as if it were alone."""
    alone = _one(opcode, count, compute, "f32", mode, flag)

    def expected(*operands):
        low = alone.expected(*(o & 0xFFFFFFFF for o in operands))
        high = alone.expected(*(o >> 32 for o in operands))
        # Where one may be any NaN, the two cannot be compared in one piece.
        if None in (low, high) or exact.NAN in (low, high):
            return None
        return high << 32 | low

    rng = random.Random(count)
    values = [h << 32 | x for h, x in zip(*(draws("f32", 400, rng) for _ in "hl"), strict=True)]
    text = alone.text.replace(".f32 ", ".f32x2 ")
    return Case(text, "b64", ("b64",) * count, (values,) * count, expected)


def _seed(opcode, function, domain):
    """rcp and rsqrt of f64: of the upper words alone, to 20 bits; subnormals are zeros."""

    def expected(a):
        a = a >> 32 << 32
        form = exact.FORMATS["f64"]
        value = exact.decode(a if a & form.infinity else a & form.sign, "f64")
        result = function(value)
        if result == exact.NAN:
            return result
        bits = exact.encode(result, "f64")
        return (bits if bits & form.infinity else bits & form.sign) >> 32 << 32

    text = f"{opcode}.approx.ftz.f64 {{d}}, {{a}}"
    return Case(text, "b64", ("b64",), (domain,), expected, "f64", tolerance=2.0**-20)


def _inverse(value):
    return exact.divide(Fraction(1), value)


def _inverse_root(value):
    return exact.divide(Fraction(1), _root(value, "rn"))


def _quotient(kind, ftz=""):
    def expected(a, b):
        if ftz:
            a, b = flushed(a, "f32"), flushed(b, "f32")
        x, y = exact.decode(a, "f32"), exact.decode(b, "f32")
        # PTX promises nothing where the divisor lies beyond 2^126.
        if exact.is_finite(y) and not Fraction(2) ** -126 <= abs(exact.number(y)) <= 2**126:
            return None
        bits = exact.encode(exact.divide(x, y), "f32")
        return flushed(bits, "f32") if ftz and bits != exact.NAN else bits

    text = f"div.{kind}{ftz}.f32 {{d}}, {{a}}, {{b}}"
    return Case(text, "b32", ("b32",) * 2, ("f32",) * 2, expected, "f32", tolerance=2.0**-22)


CASES = [
    *arithmetic("add", 2, _add, flags=_F32),
    *arithmetic("sub", 2, _subtract, flags=_F32),
    *arithmetic("mul", 2, _multiply, flags=_F32),
    *arithmetic("fma", 3, _fused, rounds=(".rn", ".rz", ".rm", ".rp"), flags=_F32),
    *arithmetic("add", 2, _add, "f64"),
    *arithmetic("sub", 2, _subtract, "f64"),
    *arithmetic("mul", 2, _multiply, "f64"),
    *arithmetic("fma", 3, _fused, "f64", rounds=(".rn", ".rz", ".rm", ".rp")),
    *arithmetic("div", 2, _divide, rounds=(".rn", ".rz", ".rm", ".rp"), flags=[".ftz"]),
    *arithmetic("div", 2, _divide, "f64", rounds=(".rn", ".rz", ".rm", ".rp")),
    *arithmetic("rcp", 1, _reciprocal, rounds=(".rn", ".rz", ".rm", ".rp"), flags=[".ftz"]),
    *arithmetic("rcp", 1, _reciprocal, "f64", rounds=(".rn", ".rz", ".rm", ".rp")),
    *arithmetic("sqrt", 1, _root, rounds=(".rn", ".rz", ".rm", ".rp"), flags=[".ftz"]),
    *arithmetic("sqrt", 1, _root, "f64", rounds=(".rn", ".rz", ".rm", ".rp")),
    *(
        extreme(opcode, "f32", sign, 2, modifiers)
        for opcode, sign in (("min", -1), ("max", 1))
        for modifiers in ("", ".ftz", ".NaN", ".xorsign.abs", ".ftz.NaN.xorsign.abs")
    ),
    *(
        extreme(opcode, "f32", sign, 3, modifiers)
        for opcode, sign in (("min", -1), ("max", 1))
        for modifiers in ("", ".NaN", ".abs", ".ftz.NaN.abs")
    ),
    *(_of_zeros("min", name, -1) for name in ("f32", "f64")),
    *(_of_zeros("max", name, 1) for name in ("f32", "f64")),
    extreme("min", "f64", -1),
    extreme("max", "f64", 1),
    *(_sign_bit("neg", name, lambda a, sign: a ^ sign) for name in ("f32", "f64")),
    *(_sign_bit("abs", name, lambda a, sign: a & ~sign) for name in ("f32", "f64")),
    Case(
        "neg.ftz.f32 {d}, {a}",
        "b32",
        ("b32",),
        ("f32",),
        lambda a: exact.NAN if exact.is_nan_bits(a, "f32") else flushed(a, "f32") ^ 1 << 31,
        "f32",
    ),
    Case(
        "abs.ftz.f32 {d}, {a}",
        "b32",
        ("b32",),
        ("f32",),
        lambda a: exact.NAN if exact.is_nan_bits(a, "f32") else flushed(a, "f32") & ~(1 << 31),
        "f32",
    ),
    *(
        Case(
            f"copysign.f{w} {{d}}, {{a}}, {{b}}",
            f"b{w}",
            (f"b{w}",) * 2,
            (f"f{w}",) * 2,
            lambda a, b, w=w: a & 1 << (w - 1) | b & (1 << (w - 1)) - 1,
        )
        for w in (32, 64)
    ),
    *(
        paired(opcode, 2, compute, mode, flag)
        for opcode, compute in (("add", _add), ("sub", _subtract), ("mul", _multiply))
        for mode, flag in (("", ""), (".rz", ""), (".rn", ".ftz"))
    ),
    *(paired("fma", 3, _fused, mode, flag) for mode, flag in ((".rn", ""), (".rp", ".ftz"))),
    *arithmetic("mad", 3, _fused, rounds=(".rn", ".rz"), flags=[".ftz.sat"]),
    *arithmetic("mad", 3, _fused, "f64", rounds=(".rn", ".rp")),
    *(_quotient(kind, ftz) for kind in ("approx", "full") for ftz in ("", ".ftz")),
    _seed("rcp", _inverse, "f64"),
    _seed("rsqrt", _inverse_root, "f64"),
    Case(
        "rsqrt.approx.f64 {d}, {a}",
        "b64",
        ("b64",),
        ("f64",),
        lambda a: exact.encode(_inverse_root(exact.decode(a, "f64")), "f64"),
        "f64",
        tolerance=2.0**-50,
    ),
    *(
        _approximate(f"ex2.approx{ftz}", lambda x: 2.0**x if x < 128 else math.inf, _WIDE)
        for ftz in ("", ".ftz")
    ),
    *(_approximate(f"lg2.approx{ftz}", math.log2, _POSITIVE) for ftz in ("", ".ftz")),
    *(_approximate(f"rcp.approx{ftz}", lambda x: 1 / x, _POSITIVE) for ftz in ("", ".ftz")),
    *(_approximate(f"sqrt.approx{ftz}", math.sqrt, _POSITIVE) for ftz in ("", ".ftz")),
    *(_approximate(f"rsqrt.approx{ftz}", lambda x: x**-0.5, _POSITIVE) for ftz in ("", ".ftz")),
    *(_approximate(f"sin.approx{ftz}", math.sin, _SMALL) for ftz in ("", ".ftz")),
    *(_approximate(f"cos.approx{ftz}", math.cos, _SMALL) for ftz in ("", ".ftz")),
    _approximate("tanh.approx", math.tanh, _SMALL),
]
