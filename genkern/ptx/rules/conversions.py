"""cvt, cvta, mov, isspacep."""

from genkern.ptx.errors import UnsupportedPTX
from genkern.ptx.program import SIZES, Register, Sink, Symbol, Vector
from genkern.ptx.rules.table import Rule

_INTEGERS = ".u8|.s8|.u16|.s16|.u32|.s32|.u64|.s64"
_FLOATS = ".f16|.bf16|.f32|.f64"
_ROUND = "(round=.rn|.rz|.rm|.rp)"
_INTEGRAL = "(round=.rni|.rzi|.rmi|.rpi)"
_PACK = "d:{to}x2 a:f32 b:f32"


def _mov(translator, instruction, words):
    """mov between registers, from constants and addresses, and packing of vectors."""
    if len(instruction.operands) != 2:
        raise UnsupportedPTX("two operands expected")
    to, source = instruction.operands
    type_ = words["type"]
    if isinstance(source, Vector):
        size = SIZES[type_] // len(source.elements)
        part = f"u{8 * size}"
        text = f"{type_}(0)"
        for i, element in enumerate(source.elements):
            value = translator.source(element, part)
            text += f" | {type_}({value}) << {8 * size * i}"
        return translator.assign(to, type_, text)
    if isinstance(to, Vector):
        size = SIZES[type_] // len(to.elements)
        part, text = f"u{8 * size}", f"const {type_} whole = {translator.source(source, type_)}; "
        for i, element in enumerate(to.elements):
            if not isinstance(element, Sink):
                text += translator.assign(element, part, f"{part}(whole >> {8 * size * i})") + " "
        return "{ " + text + "}"
    if isinstance(source, Symbol):
        return translator.assign(to, type_, f"{type_}({translator.address_of(source)})")
    return translator.assign(to, type_, translator.source(source, type_))


def _cvta(translator, instruction, words):
    to, source = instruction.operands
    window = {"shared": "shared_window", "shared_cta": "shared_window", "local": "local_window"}
    offset = window.get(words["space"], "0")
    if isinstance(source, Register):
        value = translator.source(source, "u64")
    elif isinstance(source, Symbol):
        value = f"u64({translator.address_of(source)})"
    else:
        raise UnsupportedPTX("an address in a register expected")
    sign = "-" if words["direction"] == "to" else "+"
    return translator.assign(to, "u64", f"{value} {sign} {offset}")


RULES = [
    Rule("mov(type=.pred|.b16|.b32|.b64|.u16|.s16|.u32|.s32|.u64|.s64|.f32|.f64)", "", _mov),
    Rule(
        "cvta(direction=.to)?(space=.global|.shared|.shared::cta|.local|.const|.param).u64",
        "",
        _cvta,
    ),
    Rule("isspacep.shared", "d:pred a:u64", "a - shared_window < window_bytes"),
    Rule("isspacep.shared::cta", "d:pred a:u64", "a - shared_window < window_bytes"),
    Rule("isspacep.local", "d:pred a:u64", "a - local_window < window_bytes"),
    Rule("isspacep.global", "d:pred a:u64", "a < shared_window"),
    # Between integers.
    Rule(
        f"cvt(sat=.sat)?(to={_INTEGERS})(from={_INTEGERS})",
        "d:{to} a:{from}",
        "integer<{to}, {sat}>(a)",
    ),
    # Integer to float, float to integer.
    Rule(
        f"cvt{_ROUND}(sat=.sat)?(to={_FLOATS})(from={_INTEGERS})",
        "d:{to} a:{from}",
        "from_integer<{to}, {round}, {sat}>(a)",
    ),
    Rule(
        f"cvt{_INTEGRAL}(ftz=.ftz)?(sat=.sat)?(to={_INTEGERS})(from={_FLOATS})",
        "d:{to} a:{from}",
        "to_integer<{to}, {round}, {ftz}>(a)",
    ),
    # Between floats; without a rounding where nothing is lost.
    Rule(
        f"cvt{_ROUND}(ftz=.ftz)?(sat=.sat)?(relu=.relu)?(to=.f16|.bf16|.f32)(from=.f32|.f64)",
        "d:{to} a:{from}",
        "convert<{to}, {round}, {ftz}, {sat}, {relu}>(a)",
    ),
    Rule(
        "cvt(ftz=.ftz)?(sat=.sat)?(to=.f32|.f64)(from=.f16|.bf16|.f32|.f64)",
        "d:{to} a:{from}",
        "convert<{to}, rn, {ftz}, {sat}, none>(a)",
    ),
    Rule(
        f"cvt{_ROUND}(to=.f16|.bf16)(from=.f16|.bf16)",
        "d:{to} a:{from}",
        "convert<{to}, {round}, none, none, none>(a)",
    ),
    *(
        Rule(
            f"cvt{_INTEGRAL}(ftz=.ftz)?(sat=.sat)?.{type_}.{type_}",
            f"d:{type_} a:{type_}",
            f"to_integral<{type_}, {{round}}, {{ftz}}, {{sat}}>(a)",
        )
        for type_ in ("f16", "bf16", "f32", "f64")
    ),
    # Two floats into the halves of a register: a above, b below.
    Rule(
        "cvt(round=.rn|.rz)(relu=.relu)?(to=.f16|.bf16)x2.f32",
        _PACK,
        "{to}x2{{convert<{to}, {round}, none, none, {relu}>(b), "
        "convert<{to}, {round}, none, none, {relu}>(a)}}",
    ),
    Rule(
        "cvt(round=.rna|.rn|.rz).tf32.f32", "d:b32 a:f32", "bit_cast<b32>(tf32_rounded(a, {round}))"
    ),
]
