"""Integer arithmetic, bits and predicates."""

from genkern.ptx.rules.table import Rule

_INTEGERS = ".u16|.s16|.u32|.s32|.u64|.s64"
_BITS = ".b16|.b32|.b64"


def _carry(translator, instruction, words):
    """add.cc, addc, sub.cc, subc, mad.cc, madc: the flag lives in the thread."""
    operation, type_ = words["op"], words["type"]
    wide = {"u32": "u64", "s32": "u64", "b32": "u64"}.get(type_, "u128")
    unsigned = "u" + type_[1:]
    d = instruction.operands[0]
    sources = [translator.source(o, type_) for o in instruction.operands[1:]]
    sources = [f"{wide}({unsigned}({s}))" for s in sources]
    bits = type_[1:]
    if operation.startswith("mad"):
        part = f"{sources[0]} * {sources[1]}"
        if words["part"] == "hi":
            signed = f"u{bits}(high_product({type_}({sources[0]}), {type_}({sources[1]})))"
            part = f"{wide}({signed})"
        else:
            part = f"{wide}({unsigned}({part}))"
        sources = [part, sources[2]]
    carry_in = " + t.carry" if operation in ("addc", "madc") else ""
    if operation.startswith("sub"):
        borrow = " - t.carry" if operation == "subc" else ""
        total = f"{sources[0]} - {sources[1]}{borrow}"
    else:
        total = f"{sources[0]} + {sources[1]}{carry_in}"
    flag = f" t.carry = u32(total >> {bits}) & 1;" if words["cc"] == "cc" else ""
    assigned = translator.assign(d, type_, f"{type_}(total)")
    return f"{{ const {wide} total = {total};{flag} {assigned} }}"


RULES = [
    Rule(f"add(type={_INTEGERS})", "d:{type} a:{type} b:{type}", "a + b"),
    Rule("add(op=.sat).s32", "d:s32 a:s32 b:s32", "saturated(s64(a) + b)"),
    Rule(f"sub(type={_INTEGERS})", "d:{type} a:{type} b:{type}", "a - b"),
    Rule("sub(op=.sat).s32", "d:s32 a:s32 b:s32", "saturated(s64(a) - b)"),
    Rule("(op=add|addc|sub|subc)(cc=.cc)?(type=.u32|.s32|.b32|.u64|.s64|.b64)", "", _carry),
    Rule(f"mul.lo(type={_INTEGERS})", "d:{type} a:{type} b:{type}", "{type}(u64(a) * u64(b))"),
    Rule(f"mul.hi(type={_INTEGERS})", "d:{type} a:{type} b:{type}", "high_product(a, b)"),
    Rule("mul.wide.u16", "d:u32 a:u16 b:u16", "u32(a) * b"),
    Rule("mul.wide.s16", "d:s32 a:s16 b:s16", "s32(a) * b"),
    Rule("mul.wide.u32", "d:u64 a:u32 b:u32", "u64(a) * b"),
    Rule("mul.wide.s32", "d:s64 a:s32 b:s32", "s64(a) * b"),
    Rule(
        f"mad.lo(type={_INTEGERS})",
        "d:{type} a:{type} b:{type} c:{type}",
        "{type}(u64(a) * u64(b) + u64(c))",
    ),
    Rule(
        f"mad.hi(type={_INTEGERS})",
        "d:{type} a:{type} b:{type} c:{type}",
        "{type}(u64(high_product(a, b)) + u64(c))",
    ),
    Rule("mad.wide.u16", "d:u32 a:u16 b:u16 c:u32", "u32(a) * b + c"),
    Rule("mad.wide.s16", "d:s32 a:s16 b:s16 c:s32", "s32(a) * b + c"),
    Rule("mad.wide.u32", "d:u64 a:u32 b:u32 c:u64", "u64(a) * b + c"),
    Rule("mad.wide.s32", "d:s64 a:s32 b:s32 c:s64", "s64(a) * b + c"),
    Rule("mul24.lo(type=.u32|.s32)", "d:{type} a:{type} b:{type}", "{type}(product24(a, b))"),
    Rule(
        "mad24.lo(type=.u32|.s32)",
        "d:{type} a:{type} b:{type} c:{type}",
        "{type}(u64(product24(a, b)) + u64(c))",
    ),
    Rule("(op=mad|madc)(part=.lo|.hi)(cc=.cc)?(type=.u32|.s32|.u64|.s64)", "", _carry),
    Rule(f"div(type={_INTEGERS})", "d:{type} a:{type} b:{type}", "quotient(a, b)"),
    Rule(f"rem(type={_INTEGERS})", "d:{type} a:{type} b:{type}", "remainder(a, b)"),
    Rule("abs(type=.s16|.s32|.s64)", "d:{type} a:{type}", "a < 0 ? -a : a"),
    Rule("neg(type=.s16|.s32|.s64)", "d:{type} a:{type}", "-a"),
    Rule(f"min(type={_INTEGERS})", "d:{type} a:{type} b:{type}", "least(a, b)"),
    Rule(f"max(type={_INTEGERS})", "d:{type} a:{type} b:{type}", "greatest(a, b)"),
    Rule("min.relu.s32", "d:s32 a:s32 b:s32", "greatest(least(a, b), 0)"),
    Rule("max.relu.s32", "d:s32 a:s32 b:s32", "greatest(greatest(a, b), 0)"),
    Rule(
        f"sad(type={_INTEGERS})",
        "d:{type} a:{type} b:{type} c:{type}",
        "c + {type}(distance(a, b))",
    ),
    Rule("popc(type=.b32|.b64)", "d:u32 a:{type}", "population(a)"),
    Rule("clz(type=.b32|.b64)", "d:u32 a:{type}", "leading_zeros(a)"),
    Rule("brev(type=.b32|.b64)", "d:{type} a:{type}", "bits_reversed(a)"),
    Rule("bfind(type=.u32|.s32|.u64|.s64)", "d:u32 a:{type}", "highest_bit<0>(a)"),
    Rule("bfind.shiftamt(type=.u32|.s32|.u64|.s64)", "d:u32 a:{type}", "highest_bit<1>(a)"),
    Rule(
        "bfe(type=.u32|.s32|.u64|.s64)", "d:{type} a:{type} b:u32 c:u32", "field_extract(a, b, c)"
    ),
    Rule(
        "bfi(type=.b32|.b64)",
        "d:{type} a:{type} b:{type} c:u32 e:u32",
        "field_insert(a, b, c, e)",
    ),
    Rule("dp4a.u32.u32", "d:u32 a:b32 b:b32 c:u32", "byte_dot<u8, u8>(a, b, c)"),
    Rule("dp4a.u32.s32", "d:s32 a:b32 b:b32 c:s32", "byte_dot<u8, s8>(a, b, c)"),
    Rule("dp4a.s32.u32", "d:s32 a:b32 b:b32 c:s32", "byte_dot<s8, u8>(a, b, c)"),
    Rule("dp4a.s32.s32", "d:s32 a:b32 b:b32 c:s32", "byte_dot<s8, s8>(a, b, c)"),
    Rule("szext(mode=.clamp).s32", "d:s32 a:s32 b:u32", "s32(sign_extended(u32(a), b, true))"),
    Rule("szext(mode=.clamp).u32", "d:u32 a:u32 b:u32", "sign_extended(a, b, false)"),
    Rule("szext(mode=.wrap).s32", "d:s32 a:s32 b:u32", "s32(sign_extended(u32(a), b & 31, true))"),
    Rule("szext(mode=.wrap).u32", "d:u32 a:u32 b:u32", "sign_extended(a, b & 31, false)"),
    # Bits.
    Rule("and(type=.pred|.b16|.b32|.b64)", "d:{type} a:{type} b:{type}", "a & b"),
    Rule("or(type=.pred|.b16|.b32|.b64)", "d:{type} a:{type} b:{type}", "a | b"),
    Rule("xor(type=.pred|.b16|.b32|.b64)", "d:{type} a:{type} b:{type}", "a ^ b"),
    Rule(f"not(type={_BITS})", "d:{type} a:{type}", "~a"),
    Rule("not.pred", "d:pred a:pred", "!a"),
    Rule(f"cnot(type={_BITS})", "d:{type} a:{type}", "a == 0 ? 1 : 0"),
    Rule("lop3.b32", "d:b32 a:b32 b:b32 c:b32 e:u32", "logic3(a, b, c, e)"),
    Rule(f"shl(type={_BITS})", "d:{type} a:{type} b:u32", "shift_left(a, b)"),
    Rule(f"shr(type={_INTEGERS}|.b16|.b32|.b64)", "d:{type} a:{type} b:u32", "shift_right(a, b)"),
    Rule("shf.l.wrap.b32", "d:b32 a:b32 b:b32 c:u32", "funnel_left(a, b, c & 31)"),
    Rule("shf.r.wrap.b32", "d:b32 a:b32 b:b32 c:u32", "funnel_right(a, b, c & 31)"),
    Rule("shf.l.clamp.b32", "d:b32 a:b32 b:b32 c:u32", "funnel_left(a, b, least(c, 32u))"),
    Rule("shf.r.clamp.b32", "d:b32 a:b32 b:b32 c:u32", "funnel_right(a, b, least(c, 32u))"),
    Rule("prmt.b32", "d:b32 a:b32 b:b32 c:u32", "bytes_permuted(a, b, c)"),
]
