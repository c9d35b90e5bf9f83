"""set, testp, slct and comparisons of pairs, by exact rational arithmetic."""

from fractions import Fraction

import ptx_exact as exact
from ptx_conformance import Case, signed
from ptx_conversion_cases import _COMPARE, _float_truth
from ptx_float_cases import flushed

_BITS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_COMBINE = {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}


def _special(name):
    """Few numbers, so that some are equal; with zeros, a subnormal, infinities and NaN."""
    form = exact.FORMATS[name]
    one = exact.encode(Fraction(1), name)
    return [0, form.sign, 1, one, one | form.sign, form.infinity, form.infinity | 1]


def _true(to):
    """The bits of `true` as set writes them."""
    if to in _BITS:
        return exact.encode(Fraction(1), to)
    return (1 << int(to[1:])) - 1


def _truth(operation, name, ftz):
    """Of the bits of two numbers."""

    def truth(a, b):
        if name in _BITS:
            if ftz:
                a, b = flushed(a, name), flushed(b, name)
            return _float_truth(operation, a, b, name)
        if name[0] == "s":
            a, b = signed(a, int(name[1:])), signed(b, int(name[1:]))
        return _COMPARE[operation]((a > b) - (a < b))

    return truth


def _set(operation, to, name, ftz="", boolean=""):
    truth = _truth(operation, name, ftz)
    width = _BITS.get(name) or int(name[1:])
    kind = _special(name) if name in _BITS else str(width)
    result = f"b{16 if to in ('f16', 'bf16') else int(to[1:])}"
    text = f"set.{operation}{'.' + boolean if boolean else ''}{ftz}.{to}.{name} {{d}}, {{a}}, {{b}}"
    if not boolean:
        return Case(text, result, (f"b{width}",) * 2, (kind,) * 2,
                    lambda a, b: _true(to) * truth(a, b))  # fmt: skip
    return Case(text + ", {c}", result, (f"b{width}", f"b{width}", "pred"), (kind, kind, [0, 1]),
                lambda a, b, c: _true(to) * _COMBINE[boolean](int(truth(a, b)), c))  # fmt: skip


def _pairs(name):
    values = _special(name)
    return [high << 16 | low for high in values for low in values]


def _set_pairs(operation, to, name, ftz=""):
    truth = _truth(operation, name, ftz)
    one = 0xFFFF if to[0] in "us" else exact.encode(Fraction(1), name)

    def expected(a, b):
        return one * truth(a & 0xFFFF, b & 0xFFFF) | one * truth(a >> 16, b >> 16) << 16

    text = f"set.{operation}{ftz}.{to}.{name}x2 {{d}}, {{a}}, {{b}}"
    return Case(text, "b32", ("b32",) * 2, (_pairs(name),) * 2, expected)


def _setp_pairs(operation, name, ftz=""):
    truth = _truth(operation, name, ftz)
    for targets, shift in (("{d}|{q}", 0), ("{q}|{d}", 16)):
        text = f"setp.{operation}{ftz}.{name}x2 {targets}, {{a}}, {{b}}"
        yield Case(
            text,
            "pred",
            ("b32",) * 2,
            (_pairs(name),) * 2,
            lambda a, b, by=shift: int(truth(a >> by & 0xFFFF, b >> by & 0xFFFF)),
        )


def _classes(bits, name):
    """What testp says of a number."""
    form = exact.FORMATS[name]
    magnitude = bits & (form.sign - 1)
    return {
        "finite": magnitude < form.infinity,
        "infinite": magnitude == form.infinity,
        "number": magnitude <= form.infinity,
        "notanumber": magnitude > form.infinity,
        "normal": 1 << form.mantissa <= magnitude < form.infinity,
        "subnormal": 0 < magnitude < 1 << form.mantissa,
    }


def _testp(question, name):
    text = f"testp.{question}.{name} {{d}}, {{a}}"
    return Case(
        text, "pred", (f"b{_BITS[name]}",), (name,), lambda a: int(_classes(a, name)[question])
    )


def _slct(type_, by, ftz=""):
    register = f"b{type_[1:]}"

    def expected(a, b, c):
        if by == "s32":
            return a if signed(c, 32) >= 0 else b
        value = exact.decode(flushed(c, "f32") if ftz else c, "f32")
        if value == "nan":
            return b
        return a if value == "inf" or (value != "-inf" and exact.number(value) >= 0) else b

    kind = "32" if by == "s32" else [*_special("f32"), 0x80000001]
    return Case(
        f"slct{ftz}.{type_}.{by} {{d}}, {{a}}, {{b}}, {{c}}",
        register,
        (register, register, "b32"),
        (type_[1:], type_[1:], kind),
        expected,
    )


CASES = [
    *(_set(op, to, t) for op in _COMPARE for to, t in
      (("u32", "s32"), ("s32", "u32"), ("f32", "s64"), ("u32", "u16"))),
    *(_set("eq", "u32", f"b{w}") for w in (16, 32, 64)),
    *(_set(op, "u32", t) for op in ("lt", "geu", "ne", "num", "nan") for t in ("f32", "f64")),
    *(_set(op, "f32", "f32", ".ftz") for op in ("gt", "leu")),
    *(_set("lt", to, t, "", b) for b in _COMBINE for to, t in
      (("u32", "s32"), ("f32", "f32"), ("s32", "f64"))),
    *(_set("ne", "s32", "b32", "", b) for b in _COMBINE),
    *(_set(op, to, t) for op in ("lt", "neu") for to, t in
      (("f16", "f16"), ("u16", "f16"), ("s32", "f16"), ("bf16", "bf16"), ("u32", "bf16"))),
    _set("lt", "f16", "f16", ".ftz"),
    *(_set_pairs(op, to, t) for op in ("ge", "ltu") for to, t in
      (("f16x2", "f16"), ("u32", "f16"), ("bf16x2", "bf16"), ("s32", "bf16"))),
    _set_pairs("ne", "f16x2", "f16", ".ftz"),
    *(case for op in ("le", "neu", "nan") for t in ("f16", "bf16") for case in _setp_pairs(op, t)),
    *_setp_pairs("gt", "f16", ".ftz"),
    *(_testp(q, t) for q in _classes(0, "f32") for t in ("f32", "f64")),
    *(_slct(t, "s32") for t in ("b16", "s64", "f64")),
    *(_slct(t, "f32") for t in ("b32", "u64", "f32")),
    _slct("b32", "f32", ".ftz"),
]  # fmt: skip
