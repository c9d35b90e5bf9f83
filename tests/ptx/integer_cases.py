"""Integer instructions, by Python's integers."""

from ptx_conformance import Case, masked, signed


def _value(bits, type_):
    width = int(type_[1:])
    return signed(bits, width) if type_[0] == "s" else masked(bits, width)


def _binary(opcode, type_, function, low=None):
    """d = function(a, b) in integers, wrapped to the type."""
    width = int(type_[1:])
    register = f"b{width}"
    kind = low if low is not None else str(width)

    def expected(a, b):
        result = function(_value(a, type_), _value(b, type_))
        return None if result is None else masked(result, width)

    text = f"{opcode}.{type_} {{d}}, {{a}}, {{b}}"
    return Case(text, register, (register, register), (str(width), kind), expected)


def _unary(opcode, type_, function, result=None):
    width = int(type_[1:])
    result = result or width

    def expected(a):
        return masked(function(_value(a, type_)), result)

    text = f"{opcode}.{type_} {{d}}, {{a}}"
    return Case(text, f"b{result}", (f"b{width}",), (str(width),), expected)


def _divide(a, b):
    return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a, b):
    return None if b == 0 else abs(a) % abs(b) * (-1 if a < 0 else 1)


def _bfind(width, is_signed, shift):
    def function(a):
        if is_signed and a < 0:
            a = ~a
        if a == 0:
            return 0xFFFFFFFF
        position = a.bit_length() - 1
        return width - 1 - position if shift else position

    return function


def _bfe(type_):
    width = int(type_[1:])

    def expected(a, position, length):
        position, length = position & 255, length & 255
        if length == 0:
            return 0
        value = _value(a, type_)
        if position >= width:
            return masked(-1, width) if value < 0 else 0
        field = value >> position
        if length < width - position:
            field = masked(field, length)
            if type_[0] == "s":
                field = signed(field, length)
        return masked(field, width)

    text = f"bfe.{type_} {{d}}, {{a}}, {{b}}, {{c}}"
    small = [*list(range(0, 70)), 255, 256, 257]
    return Case(
        text, f"b{width}", (f"b{width}", "b32", "b32"), (str(width), small, small), expected
    )


def _bfi(width):
    def expected(a, b, position, length):
        position, length = position & 255, length & 255
        mask = masked(((1 << length) - 1) << position, width)
        return masked(b & ~mask | (a << position) & mask, width)

    text = f"bfi.b{width} {{d}}, {{a}}, {{b}}, {{c}}, {{e}}"
    small = [*list(range(0, 70)), 255, 256, 257]
    register = f"b{width}"
    return Case(
        text,
        register,
        (register, register, "b32", "b32"),
        (str(width), str(width), small, small),
        expected,
    )


def _shift(opcode, type_):
    width = int(type_[1:])

    def expected(a, by):
        a = _value(a, type_) if opcode == "shr" else a
        return masked(a << by if opcode == "shl" else a >> by, width)

    text = f"{opcode}.{type_} {{d}}, {{a}}, {{b}}"
    amounts = [*list(range(0, 70)), 1000]
    return Case(text, f"b{width}", (f"b{width}", "b32"), (str(width), amounts), expected)


def _mad(opcode, type_, part):
    width = int(type_[1:])
    out = 2 * width if part == "wide" else width

    def expected(a, b, c):
        product = _value(a, type_) * _value(b, type_)
        if part == "hi":
            product >>= width
        return masked(product + _value(c, type_[0] + str(out)), out)

    text = f"{opcode}.{part}.{type_} {{d}}, {{a}}, {{b}}, {{c}}"
    kinds = (str(width), str(width), str(out))
    return Case(text, f"b{out}", (f"b{width}", f"b{width}", f"b{out}"), kinds, expected)


def _mul(type_, part):
    width = int(type_[1:])
    out = 2 * width if part == "wide" else width

    def expected(a, b):
        product = _value(a, type_) * _value(b, type_)
        return masked(product >> width if part == "hi" else product, out)

    text = f"mul.{part}.{type_} {{d}}, {{a}}, {{b}}"
    return Case(text, f"b{out}", (f"b{width}", f"b{width}"), (str(width),) * 2, expected)


def _lop3(table):
    def expected(a, b, c):
        result = 0
        for i in range(32):
            index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1
            result |= (table >> index & 1) << i
        return result

    text = f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table:#x}"
    return Case(text, "b32", ("b32",) * 3, ("32",) * 3, expected)


def _prmt():
    def expected(a, b, c):
        pool = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
        result = 0
        for i in range(4):
            selector = c >> 4 * i & 15
            byte = pool[selector & 7]
            if selector & 8:
                byte = 255 if byte & 128 else 0
            result |= byte << 8 * i
        return result

    return Case("prmt.b32 {d}, {a}, {b}, {c}", "b32", ("b32",) * 3, ("32",) * 3, expected)


def _funnel(direction, mode):
    def expected(a, b, c):
        by = min(c, 32) if mode == "clamp" else c & 31
        pair = b << 32 | a
        return masked(pair << by >> 32 if direction == "l" else pair >> by, 32)

    text = f"shf.{direction}.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}}"
    return Case(text, "b32", ("b32",) * 3, ("32", "32", list(range(0, 70))), expected)


def _dp4a(a_type, b_type):
    def expected(a, b, c):
        def part(word, type_, i):
            return _value(word >> 8 * i, type_[0] + "8")

        dot = sum(part(a, a_type, i) * part(b, b_type, i) for i in range(4))
        return masked(dot + c, 32)

    text = f"dp4a.{a_type}.{b_type} {{d}}, {{a}}, {{b}}, {{c}}"
    return Case(text, "b32", ("b32",) * 3, ("32",) * 3, expected)


def _saturating(opcode, sign):
    def expected(a, b):
        total = signed(a, 32) + sign * signed(b, 32)
        return masked(min(max(total, -(2**31)), 2**31 - 1), 32)

    return Case(f"{opcode}.sat.s32 {{d}}, {{a}}, {{b}}", "b32", ("b32",) * 2, ("32",) * 2, expected)


def _carry(text, before, function, width=32):
    register = f"b{width}"
    return Case(
        text,
        register,
        (register,) * 4,
        (str(width),) * 4,
        lambda a, b, c, e: masked(function(a, b, c, e), width),
        before=before,
    )


def _szext(mode, type_):
    def expected(a, b):
        width = min(b, 32) if mode == "clamp" else b % 32
        return 0 if width == 0 else masked(_value(a, f"{type_[0]}{width}"), 32)

    kinds = ("32", [*range(70), 1 << 31])
    return Case(f"szext.{mode}.{type_} {{d}}, {{a}}, {{b}}", "b32", ("b32",) * 2, kinds, expected)


def _product24(type_, count):
    def expected(a, b, c=0):
        return masked(_value(a, type_[0] + "24") * _value(b, type_[0] + "24") + c, 32)

    opcode, names = ("mul24", "{a}, {b}") if count == 2 else ("mad24", "{a}, {b}, {c}")
    text = f"{opcode}.lo.{type_} {{d}}, {names}"
    return Case(text, "b32", ("b32",) * count, ("32",) * count, expected)


_ALL = ("u16", "s16", "u32", "s32", "u64", "s64")

CASES = [
    *(_binary("add", t, lambda a, b: a + b) for t in _ALL),
    *(_binary("sub", t, lambda a, b: a - b) for t in _ALL),
    *(_binary("div", t, _divide) for t in _ALL),
    *(_binary("rem", t, _remainder) for t in _ALL),
    *(_binary("min", t, min) for t in _ALL),
    *(_binary("max", t, max) for t in _ALL),
    _binary("min.relu", "s32", lambda a, b: max(min(a, b), 0)),
    _binary("max.relu", "s32", lambda a, b: max(a, b, 0)),
    _saturating("add", 1),
    _saturating("sub", -1),
    *(_mul(t, part) for t in _ALL for part in ("lo", "hi")),
    *(_mul(t, "wide") for t in ("u16", "s16", "u32", "s32")),
    *(_mad("mad", t, part) for t in _ALL for part in ("lo", "hi")),
    *(_mad("mad", t, "wide") for t in ("u16", "s16", "u32", "s32")),
    *(_unary("abs", t, abs) for t in ("s16", "s32", "s64")),
    *(_unary("neg", t, lambda a: -a) for t in ("s16", "s32", "s64")),
    *(_unary("not", f"b{w}", lambda a: ~a) for w in (16, 32, 64)),
    *(_unary("cnot", f"b{w}", lambda a: int(a == 0)) for w in (16, 32, 64)),
    *(_unary("popc", f"b{w}", lambda a: bin(a).count("1"), 32) for w in (32, 64)),
    *(_unary("clz", f"b{w}", lambda a, w=w: w - a.bit_length(), 32) for w in (32, 64)),
    *(_unary("brev", f"b{w}", lambda a, w=w: int(f"{a:0{w}b}"[::-1], 2)) for w in (32, 64)),
    *(
        _unary(f"bfind{s}", t, _bfind(int(t[1:]), t[0] == "s", bool(s)), 32)
        for t in ("u32", "s32", "u64", "s64")
        for s in ("", ".shiftamt")
    ),
    *(_binary("and", f"b{w}", lambda a, b: a & b) for w in (16, 32, 64)),
    *(_binary("or", f"b{w}", lambda a, b: a | b) for w in (16, 32, 64)),
    *(_binary("xor", f"b{w}", lambda a, b: a ^ b) for w in (16, 32, 64)),
    *(_shift("shl", f"b{w}") for w in (16, 32, 64)),
    *(_shift("shr", t) for t in (*_ALL, "b32")),
    *(_bfe(t) for t in ("u32", "s32", "u64", "s64")),
    _bfi(32),
    _bfi(64),
    *(_lop3(table) for table in (0x80, 0xFE, 0x96, 0xCA, 0x1B, 0x40)),
    _prmt(),
    *(_funnel(d, mode) for d in "lr" for mode in ("wrap", "clamp")),
    *(_dp4a(a, b) for a in ("u32", "s32") for b in ("u32", "s32")),
    *(
        Case(
            f"sad.{t} {{d}}, {{a}}, {{b}}, {{c}}",
            f"b{t[1:]}",
            (f"b{t[1:]}",) * 3,
            (t[1:],) * 3,
            lambda a, b, c, t=t: masked(abs(_value(a, t) - _value(b, t)) + c, int(t[1:])),
        )
        for t in _ALL
    ),
    # Carries: the flag is bit 32 of the sum before.
    _carry(
        "addc.u32 {d}, {c}, {e}",
        "add.cc.u32 {d}, {a}, {b};",
        lambda a, b, c, e: c + e + (a + b >> 32),
    ),
    _carry(
        "addc.u64 {d}, {c}, {e}",
        "add.cc.u64 {d}, {a}, {b};",
        lambda a, b, c, e: c + e + (a + b >> 64),
        64,
    ),
    _carry(
        "subc.u32 {d}, {c}, {e}",
        "sub.cc.u32 {d}, {a}, {b};",
        lambda a, b, c, e: c - e - int(a < b),
    ),
    _carry(
        "madc.hi.u32 {d}, {a}, {b}, {e}",
        "mad.lo.cc.u32 {d}, {a}, {b}, {c};",
        lambda a, b, c, e: (a * b >> 32) + e + (masked(a * b, 32) + c >> 32),
    ),
    Case("and.pred {d}, {a}, {b}", "pred", ("pred", "pred"), ([0, 1], [0, 1]), lambda a, b: a & b),
    Case("or.pred {d}, {a}, {b}", "pred", ("pred", "pred"), ([0, 1], [0, 1]), lambda a, b: a | b),
    Case("xor.pred {d}, {a}, {b}", "pred", ("pred", "pred"), ([0, 1], [0, 1]), lambda a, b: a ^ b),
    Case("not.pred {d}, {a}", "pred", ("pred",), ([0, 1],), lambda a: 1 - a),
    *(_szext(mode, t) for mode in ("clamp", "wrap") for t in ("u32", "s32")),
    *(_product24(t, count) for t in ("u32", "s32") for count in (2, 3)),
    Case(
        "selp.b32 {d}, {a}, {b}, {c}",
        "b32",
        ("b32", "b32", "pred"),
        ("32", "32", [0, 1]),
        lambda a, b, c: a if c else b,
    ),
    Case(
        "slct.b32.s32 {d}, {a}, {b}, {c}",
        "b32",
        ("b32",) * 3,
        ("32",) * 3,
        lambda a, b, c: a if signed(c, 32) >= 0 else b,
    ),
]
