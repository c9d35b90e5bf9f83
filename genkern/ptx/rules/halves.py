"""Arithmetic of f16, bf16 and pairs of them."""

from genkern.ptx.rules.table import Rule

_LAMBDAS = {
    1: "each(a, [](auto x) {{ return CALL(x); }})",
    2: "each(a, b, [](auto x, auto y) {{ return CALL(x, y); }})",
    3: "each(a, b, c, [](auto x, auto y, auto z) {{ return CALL(x, y, z); }})",
}


def _both(opcode, modifiers, sources, call, types=("f16", "bf16")):
    """The rules for one element and for two."""
    names = "abc"[:sources]
    single = "|".join("." + t for t in types)
    pairs = "|".join(f".{t}x2" for t in types)
    operands = " ".join(f"{name}:{{type}}" for name in "d" + names)
    return [
        Rule(f"{opcode}{modifiers}(type={single})", operands, f"{call}({', '.join(names)})"),
        Rule(
            f"{opcode}{modifiers}(type={pairs})", operands, _LAMBDAS[sources].replace("CALL", call)
        ),
    ]


_RN = "(round=.rn)?"
_FLAGS = "(ftz=.ftz)?(sat=.sat)?"

RULES = [
    *_both("add", _RN + _FLAGS, 2, "half_add<{ftz}, {sat}>"),
    *_both("sub", _RN + _FLAGS, 2, "half_sub<{ftz}, {sat}>"),
    *_both("mul", _RN + _FLAGS, 2, "half_mul<{ftz}, {sat}>"),
    *_both("fma.rn", "(ftz=.ftz)?(sat=.sat)?", 3, "half_fma<{ftz}, {sat}, none>"),
    *_both("fma.rn", "(ftz=.ftz)?.relu", 3, "half_fma<{ftz}, none, relu>"),
    *_both("neg", "(ftz=.ftz)?", 1, "half_negated"),
    *_both("abs", "(ftz=.ftz)?", 1, "half_absolute"),
    *_both(
        "min",
        "(ftz=.ftz)?(nan=.NaN)?(xorsign=.xorsign.abs)?",
        2,
        "half_minimum<{ftz}, {nan}, {xorsign}>",
    ),
    *_both(
        "max",
        "(ftz=.ftz)?(nan=.NaN)?(xorsign=.xorsign.abs)?",
        2,
        "half_maximum<{ftz}, {nan}, {xorsign}>",
    ),
    *_both("ex2.approx", "(ftz=.ftz)?", 1, "half_exp2"),
    *_both("tanh.approx", "", 1, "half_tanh"),
]
