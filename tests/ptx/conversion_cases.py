"""cvt and comparisons, by exact rational arithmetic."""

import math
from fractions import Fraction

import ptx_exact as exact
from ptx_conformance import Case, masked, signed
from ptx_float_cases import _order, flushed

_WIDTH = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def _integer(bits, type_):
    width = int(type_[1:])
    return signed(bits, width) if type_[0] == "s" else masked(bits, width)


def _range(type_):
    width = int(type_[1:])
    if type_[0] == "s":
        return -(1 << width - 1), (1 << width - 1) - 1
    return 0, (1 << width) - 1


def _register(type_):
    width = _WIDTH.get(type_) or int(type_[1:])
    return f"b{max(width, 16)}"


def _between_integers(to, source, sat=""):
    register, width = _register(to), int(_register(to)[1:])

    def expected(a):
        value = _integer(a, source)
        if sat:
            low, high = _range(to)
            value = min(max(value, low), high)
        else:
            value = _integer(value, to)
        return masked(value, width)

    text = f"cvt{sat}.{to}.{source} {{d}}, {{a}}"
    return Case(text, register, (_register(source),), (_register(source)[1:],), expected)


def _to_float(to, source, mode, sat=""):
    def expected(a):
        bits = exact.encode(Fraction(_integer(a, source)), to, mode)
        if sat:
            value = exact.decode(bits, to)
            if value == "inf" or (exact.is_finite(value) and exact.number(value) > 1):
                return exact.encode(Fraction(1), to)
            return 0 if exact.is_negative(value) else bits
        return bits

    text = f"cvt.{mode}{sat}.{to}.{source} {{d}}, {{a}}"
    return Case(text, _register(to), (_register(source),), (_register(source)[1:],), expected, to)


def _integral(value, mode):
    whole = math.floor(value)
    rest = value - whole
    half = Fraction(1, 2)
    if mode == "rni":
        return whole + (rest > half or (rest == half and whole % 2))
    if mode == "rzi":
        return whole + (value < 0 and rest > 0)
    return whole if mode == "rmi" else whole + (rest > 0)


def _to_integer(to, source, mode, ftz=""):
    width = int(to[1:])

    def expected(a):
        value = exact.decode(flushed(a, source) if ftz else a, source)
        low, high = _range(to)
        if value == "nan":
            return None if width < 32 else 0 if width == 32 else 1 << 63
        if value in ("inf", "-inf"):
            value = low if value == "-inf" else high
        else:
            value = min(max(_integral(exact.number(value), mode), low), high)
        return masked(value, int(_register(to)[1:]))

    text = f"cvt.{mode}{ftz}.{to}.{source} {{d}}, {{a}}"
    form = exact.FORMATS[source]
    values = [exact.encode(Fraction(n, 4), source) for n in range(-40, 40)]
    values += [
        exact.encode(Fraction(s * 2**e + k), source)
        for s in (1, -1)
        for e in (7, 8, 15, 16, 31, 32, 63, 64)
        for k in (-1, 0, 1)
    ]
    values += [form.infinity, form.infinity | form.sign, form.infinity | 1 << form.mantissa - 1]
    return Case(text, _register(to), (_register(source),), (values,), expected)


def _between_floats(to, source, mode="", modifiers=""):
    def expected(a):
        a = flushed(a, source) if ".ftz" in modifiers and source == "f32" else a
        value = exact.decode(a, source)
        negative = exact.is_negative(value)
        if ".sat" in modifiers:
            if value == "nan" or negative:
                return 0
            if value == "inf" or exact.number(value) > 1:
                return exact.encode(Fraction(1), to)
        if ".relu" in modifiers and negative:
            return 0
        bits = exact.encode(value, to, mode.strip(".") or "rn")
        if ".ftz" in modifiers and to == "f32" and bits != exact.NAN:
            return flushed(bits, to)
        return bits

    text = f"cvt{mode}{modifiers}.{to}.{source} {{d}}, {{a}}"
    return Case(text, _register(to), (_register(source),), (source,), expected, to)


def _to_integral(type_, mode, modifiers=""):
    def expected(a):
        value = exact.decode(flushed(a, type_) if ".ftz" in modifiers else a, type_)
        if value == "nan":
            return exact.NAN if ".sat" not in modifiers else 0
        if not exact.is_finite(value):
            return exact.encode(value, type_)
        whole = Fraction(_integral(exact.number(value), mode))
        return exact.encode(whole or exact.signed_zero(exact.is_negative(value)), type_)

    text = f"cvt.{mode}{modifiers}.{type_}.{type_} {{d}}, {{a}}"
    return Case(text, _register(type_), (_register(type_),), (type_,), expected, type_)


def _packed(name, mode, relu=""):
    def half(bits):
        value = exact.decode(bits, "f32")
        if relu and exact.is_negative(value):
            return 0
        return exact.encode(value, name, mode)

    def expected(a, b):
        high, low = half(a), half(b)
        return None if exact.NAN in (high, low) else high << 16 | low

    text = f"cvt.{mode}{relu}.{name}x2.f32 {{d}}, {{a}}, {{b}}"
    return Case(text, "b32", ("b32", "b32"), ("f32", "f32"), expected)


def _tf32(mode):
    def expected(a):
        value = exact.decode(a, "f32")
        if not exact.is_finite(value):
            return None
        steps = {"rna": 0x1000, "rn": 0xFFF + (a >> 13 & 1), "rz": 0}[mode]
        return masked(a + steps, 32) & ~0x1FFF

    return Case(f"cvt.{mode}.tf32.f32 {{d}}, {{a}}", "b32", ("b32",), ("f32",), expected)


_COMPARE = {
    "eq": lambda o: o == 0, "ne": lambda o: o != 0, "lt": lambda o: o < 0,
    "le": lambda o: o <= 0, "gt": lambda o: o > 0, "ge": lambda o: o >= 0,
}  # fmt: skip
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _float_truth(operation, a, b, name):
    order = _order(exact.decode(a, name), exact.decode(b, name))
    if operation == "nan":
        return order is None
    if operation == "num":
        return order is not None
    if operation in _COMPARE:
        return order is not None and _COMPARE[operation](order)
    return order is None or _COMPARE[operation[:-1]](order)


def _setp_float(operation, name, ftz=""):
    def expected(a, b):
        if ftz:
            a, b = flushed(a, name), flushed(b, name)
        return int(_float_truth(operation, a, b, name))

    text = f"setp.{operation}{ftz}.{name} {{d}}, {{a}}, {{b}}"
    register = _register(name)
    special = [
        0,
        exact.FORMATS[name].sign,
        1,
        exact.encode(Fraction(1), name),
        exact.encode(Fraction(-1), name),
        exact.FORMATS[name].infinity,
        exact.FORMATS[name].infinity | 1,
    ]
    return Case(text, "pred", (register, register), (special, special), expected)


def _setp_integer(operation, type_):
    def expected(a, b):
        a, b = _integer(a, type_), _integer(b, type_)
        return int(_COMPARE[_UNSIGNED.get(operation, operation)]((a > b) - (a < b)))

    text = f"setp.{operation}.{type_} {{d}}, {{a}}, {{b}}"
    register, kind = _register(type_), type_[1:]
    return Case(text, "pred", (register, register), (kind, kind), expected)


def _setp_combined(boolean):
    combine = {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}
    return [
        Case(
            f"setp.lt.{boolean}.s32 {d}, {{a}}, {{b}}, {negation}{{c}}",
            "pred",
            ("b32", "b32", "pred"),
            ([1, 2, 3, 0xFFFFFFFF], [1, 2, 3], [0, 1]),
            lambda a, b, c, flip=flip, no=no: combine[boolean](
                int(signed(a, 32) < signed(b, 32)) ^ flip, c ^ no
            ),
        )
        for d, flip in (("{d}", 0), ("{d}|{q}", 0), ("{q}|{d}", 1))
        for negation, no in (("", 0), ("!", 1))
    ]


_INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_INTEGRAL = ("rni", "rzi", "rmi", "rpi")
_MODES = ("rn", "rz", "rm", "rp")

CASES = [
    *(_between_integers(a, b) for a in _INTEGERS for b in _INTEGERS),
    *(_between_integers(a, b, ".sat") for a in ("u8", "s8", "s16", "u32", "s32")
      for b in ("s16", "s32", "u32", "s64", "u64")),
    *(_to_float(f, i, m) for f in ("f32", "f64") for i in ("s32", "u32", "s64", "u64")
      for m in _MODES),
    *(_to_float(f, i, "rn") for f in ("f16", "bf16") for i in ("s8", "s32", "u32", "s64", "u64")),
    *(_to_float("f32", i, "rz") for i in ("u8", "s16")),
    _to_float("f32", "s32", "rn", ".sat"),
    *(_to_integer(i, f, m) for f in ("f16", "bf16", "f32", "f64") for m in _INTEGRAL
      for i in ("s32", "u64")),
    *(_to_integer(i, "f32", m, ".ftz") for m in _INTEGRAL for i in ("u32", "s64", "u16", "s8")),
    *(_between_floats(to, "f32", "." + m) for to in ("f16", "bf16") for m in _MODES),
    *(_between_floats(to, "f64", "." + m) for to in ("f16", "f32") for m in _MODES),
    *(_between_floats(to, "f32", ".rn", ".relu") for to in ("f16", "bf16")),
    *(_between_floats("f32", a, "", m) for a in ("f16", "bf16", "f32") for m in ("", ".sat")),
    *(_between_floats("f64", a) for a in ("f16", "f32")),
    _between_floats("f32", "f32", "", ".ftz.sat"),
    _between_floats("f32", "f16", "", ".ftz"),
    _between_floats("f64", "f32", "", ".ftz"),
    _between_floats("f32", "f64", ".rn", ".ftz"),
    _between_floats("f16", "bf16", ".rn"),
    *(_to_integral(t, m) for t in ("f16", "bf16", "f32", "f64") for m in _INTEGRAL),
    _to_integral("f32", "rni", ".ftz"),
    *(_packed(name, m) for name in ("f16", "bf16") for m in ("rn", "rz")),
    *(_packed(name, "rn", ".relu") for name in ("f16", "bf16")),
    *(_tf32(m) for m in ("rna", "rn", "rz")),
    *(_setp_float(op, "f32", ftz) for ftz in ("", ".ftz")
      for op in (*_COMPARE, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")),
    *(_setp_float(op, name) for name in ("f64", "f16", "bf16")
      for op in ("lt", "geu", "ne", "nan")),
    *(_setp_integer(op, t) for t in ("s16", "u32", "s32", "u64", "s64") for op in _COMPARE),
    *(_setp_integer(op, t) for t in ("u16", "u32", "u64") for op in _UNSIGNED),
    *(case for boolean in ("and", "or", "xor") for case in _setp_combined(boolean)),
]  # fmt: skip
