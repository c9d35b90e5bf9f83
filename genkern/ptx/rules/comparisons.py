"""setp, set, selp, slct, testp."""

from genkern.ptx.errors import UnsupportedPTX
from genkern.ptx.program import Pair
from genkern.ptx.rules.table import Rule

_INTEGER_TYPES = ".u16|.s16|.u32|.s32|.u64|.s64"
_ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def _comparison(operation, a, b, is_float):
    """The C++ of one comparison of values."""
    if not is_float:
        return f"{a} {(_ORDERED | _UNSIGNED)[operation]} {b}"
    if operation == "num":
        return f"(!is_nan({a}) && !is_nan({b}))"
    if operation == "nan":
        return f"(is_nan({a}) || is_nan({b}))"
    if operation == "ne":
        return f"(!is_nan({a}) && !is_nan({b}) && {a} != {b})"
    if operation in _ORDERED:
        return f"({a} {_ORDERED[operation]} {b})"
    # equ, neu, ltu, …: true as well where one is NaN
    return f"(is_nan({a}) || is_nan({b}) || {a} {_ORDERED[operation[:-1]]} {b})"


def _value(name, type_, flush):
    if type_ in ("f16", "bf16"):
        return f"wide(half_flush<{flush}>({name}))"
    return f"flush<{flush}>({name})" if type_ in ("f32", "f64") else name


def _values(translator, words, operands):
    type_ = words["type"]
    flush = words.get("ftz", "none")
    is_float = "f" in type_
    text = ""
    for name, operand in zip("ab", operands, strict=True):
        source = translator.source(operand, type_)
        text += f"const auto {name} = {_value(f'{type_}({source})', type_, flush)}; "
    return text + f"const bool found = {_comparison(words['cmp'], 'a', 'b', is_float)}; "


_COMBINE = {"and": "&&", "or": "||", "xor": "!="}


def _setp(translator, instruction, words):
    operands = instruction.operands
    expected = 3 if words.get("bool", "none") == "none" else 4
    if len(operands) != expected:
        raise UnsupportedPTX(f"{expected} operands expected")
    text = _values(translator, words, operands[1:3])
    first, second = "found", "!found"
    if expected == 4:
        third = translator.source(operands[3], "pred")
        combine = _COMBINE[words["bool"]]
        text += f"const bool with = {third}; "
        first, second = f"(found {combine} with)", f"(!found {combine} with)"
    to = operands[0]
    targets = [(to.first, first), (to.second, second)] if isinstance(to, Pair) else [(to, first)]
    assigned = " ".join(translator.assign(d, "pred", value) for d, value in targets)
    return "{ " + text + assigned + " }"


def _set(translator, instruction, words):
    operands = instruction.operands
    expected = 3 if words.get("bool", "none") == "none" else 4
    if len(operands) != expected:
        raise UnsupportedPTX(f"{expected} operands expected")
    text = _values(translator, words, operands[1:3])
    value = "found"
    if expected == 4:
        value = f"(found {_COMBINE[words['bool']]} {translator.source(operands[3], 'pred')})"
    to = words["to"]
    one, zero = {
        "f32": ("1.0f", "0.0f"),
        "f16": ("f16{0x3c00}", "f16{0}"),
        "bf16": ("bf16{0x3f80}", "bf16{0}"),
    }.get(to, (f"{to}(~{to}(0))", f"{to}(0)"))
    return "{ " + text + translator.assign(operands[0], to, f"{value} ? {one} : {zero}") + " }"


def _set_pairs(translator, instruction, words):
    """set.cmp.f16x2.f16x2, …: 1.0 or 0.0 in each half; into an integer, all ones or zero."""
    operands = instruction.operands
    if len(operands) != 3:
        raise UnsupportedPTX("3 operands expected")
    type_, flush = words["type"], words["ftz"]
    one = {"f16x2": "0x3c00", "bf16x2": "0x3f80", "u32": "0xffff", "s32": "0xffff"}[words["to"]]
    parts = []
    for half in ("low", "high"):
        a, b = (f"wide(half_flush<{flush}>({name}.{half}))" for name in "ab")
        parts.append(f"u32({_comparison(words['cmp'], a, b, True)} ? {one} : 0)")
    a, b = (translator.source(operand, type_) for operand in operands[1:])
    assigned = translator.assign(operands[0], "b32", f"{parts[0]} | {parts[1]} << 16")
    return f"{{ const {type_} a = {a}, b = {b}; {assigned} }}"


def _setp_pairs(translator, instruction, words):
    operands = instruction.operands
    if len(operands) != 3 or not isinstance(operands[0], Pair):
        raise UnsupportedPTX("two predicates and two values expected")
    type_, flush = words["type"], words["ftz"]
    text = ""
    for name, operand in zip("ab", operands[1:], strict=True):
        text += f"const {type_} {name} = {translator.source(operand, type_)}; "
    for half, to in (("low", operands[0].first), ("high", operands[0].second)):
        a, b = (f"wide(half_flush<{flush}>({name}.{half}))" for name in "ab")
        text += translator.assign(to, "pred", _comparison(words["cmp"], a, b, True)) + " "
    return "{ " + text + "}"


_FLOAT_CMP = ".eq|.ne|.lt|.le|.gt|.ge|.equ|.neu|.ltu|.leu|.gtu|.geu|.num|.nan"
_INT_CMP = ".eq|.ne|.lt|.le|.gt|.ge"
_BOOL = "(bool=.and|.or|.xor)?"
_TO = "(to=.u32|.s32|.f32)"

RULES = [
    Rule(f"setp(cmp={_INT_CMP}){_BOOL}(type={_INTEGER_TYPES})", "", _setp),
    Rule(f"setp(cmp=.eq|.ne){_BOOL}(type=.b16|.b32|.b64)", "", _setp),
    Rule(f"setp(cmp=.lo|.ls|.hi|.hs){_BOOL}(type=.u16|.u32|.u64)", "", _setp),
    Rule(f"setp(cmp={_FLOAT_CMP}){_BOOL}(ftz=.ftz)?(type=.f32|.f16)", "", _setp),
    Rule(f"setp(cmp={_FLOAT_CMP}){_BOOL}(type=.f64|.bf16)", "", _setp),
    Rule(f"setp(cmp={_FLOAT_CMP})(ftz=.ftz)?(type=.f16x2|.bf16x2)", "", _setp_pairs),
    Rule(f"set(cmp={_INT_CMP}){_BOOL}{_TO}(type={_INTEGER_TYPES})", "", _set),
    Rule(f"set(cmp=.eq|.ne){_BOOL}{_TO}(type=.b16|.b32|.b64)", "", _set),
    Rule(f"set(cmp={_FLOAT_CMP}){_BOOL}(ftz=.ftz)?{_TO}(type=.f32|.f64)", "", _set),
    Rule(
        f"set(cmp={_FLOAT_CMP})(ftz=.ftz)?(to=.f16|.bf16|.u16|.s16|.u32|.s32)(type=.f16|.bf16)",
        "",
        _set,
    ),
    Rule(
        f"set(cmp={_FLOAT_CMP})(ftz=.ftz)?(to=.f16x2|.bf16x2|.u32|.s32)(type=.f16x2|.bf16x2)",
        "",
        _set_pairs,
    ),
    Rule(
        "selp(type=.b16|.b32|.b64|.u16|.s16|.u32|.s32|.u64|.s64|.f32|.f64)",
        "d:{type} a:{type} b:{type} c:pred",
        "c ? a : b",
    ),
    Rule(
        "slct(type=.b16|.b32|.b64|.u16|.s16|.u32|.s32|.u64|.s64|.f32|.f64).s32",
        "d:{type} a:{type} b:{type} c:s32",
        "c >= 0 ? a : b",
    ),
    Rule(
        "slct(ftz=.ftz)?(type=.b16|.b32|.b64|.u16|.s16|.u32|.s32|.u64|.s64|.f32|.f64).f32",
        "d:{type} a:{type} b:{type} c:f32",
        "flush<{ftz}>(c) >= 0 ? a : b",
    ),
    Rule("testp.finite(type=.f32|.f64)", "d:pred a:{type}", "a - a == 0"),
    Rule("testp.infinite(type=.f32|.f64)", "d:pred a:{type}", "a - a != 0 && !is_nan(a)"),
    Rule("testp.number(type=.f32|.f64)", "d:pred a:{type}", "!is_nan(a)"),
    Rule("testp.notanumber(type=.f32|.f64)", "d:pred a:{type}", "is_nan(a)"),
    Rule("testp.normal(type=.f32|.f64)", "d:pred a:{type}", "__builtin_isnormal(a)"),
    Rule(
        "testp.subnormal(type=.f32|.f64)",
        "d:pred a:{type}",
        "a != 0 && a - a == 0 && !__builtin_isnormal(a)",
    ),
]
