"""Arithmetic of f32 and f64."""

from genkern.ptx.rules.table import Rule

_ROUND = "(round=.rn|.rz|.rm|.rp)"
_F32 = "(ftz=.ftz)?(sat=.sat)?(type=.f32)"
_PAIR = "(ftz=.ftz)?.f32x2"

RULES = [
    # The usual ones first and in plain C++, since a kernel has thousands of them to compile.
    Rule("add(.rn)?(type=.f32|.f64)", "d:{type} a:{type} b:{type}", "a + b"),
    Rule("sub(.rn)?(type=.f32|.f64)", "d:{type} a:{type} b:{type}", "a - b"),
    Rule("mul(.rn)?(type=.f32|.f64)", "d:{type} a:{type} b:{type}", "a * b"),
    Rule("fma.rn.f32", "d:f32 a:f32 b:f32 c:f32", "__builtin_fmaf(a, b, c)"),
    Rule("fma.rn.f64", "d:f64 a:f64 b:f64 c:f64", "__builtin_fma(a, b, c)"),
    Rule(f"add{_ROUND}?{_F32}", "d:f32 a:f32 b:f32", "add<{round}, {ftz}, {sat}>(a, b)"),
    Rule(f"sub{_ROUND}?{_F32}", "d:f32 a:f32 b:f32", "add<{round}, {ftz}, {sat}>(a, negated(b))"),
    Rule(f"mul{_ROUND}?{_F32}", "d:f32 a:f32 b:f32", "mul<{round}, {ftz}, {sat}>(a, b)"),
    Rule(f"fma{_ROUND}{_F32}", "d:f32 a:f32 b:f32 c:f32", "fma<{round}, {ftz}, {sat}>(a, b, c)"),
    Rule(f"mad{_ROUND}{_F32}", "d:f32 a:f32 b:f32 c:f32", "fma<{round}, {ftz}, {sat}>(a, b, c)"),
    Rule(f"add{_ROUND}?.f64", "d:f64 a:f64 b:f64", "add<{round}, none, none>(a, b)"),
    Rule(f"sub{_ROUND}?.f64", "d:f64 a:f64 b:f64", "add<{round}, none, none>(a, negated(b))"),
    Rule(f"mul{_ROUND}?.f64", "d:f64 a:f64 b:f64", "mul<{round}, none, none>(a, b)"),
    Rule(f"fma{_ROUND}.f64", "d:f64 a:f64 b:f64 c:f64", "fma<{round}, none, none>(a, b, c)"),
    Rule(f"mad{_ROUND}.f64", "d:f64 a:f64 b:f64 c:f64", "fma<{round}, none, none>(a, b, c)"),
    # Two floats in a 64-bit register (sm_100 and up).
    Rule(
        f"add{_ROUND}?{_PAIR}",
        "d:f32x2 a:f32x2 b:f32x2",
        "each(a, b, [](f32 x, f32 y) {{ return add<{round}, {ftz}, none>(x, y); }})",
    ),
    Rule(
        f"sub{_ROUND}?{_PAIR}",
        "d:f32x2 a:f32x2 b:f32x2",
        "each(a, b, [](f32 x, f32 y) {{ return add<{round}, {ftz}, none>(x, negated(y)); }})",
    ),
    Rule(
        f"mul{_ROUND}?{_PAIR}",
        "d:f32x2 a:f32x2 b:f32x2",
        "each(a, b, [](f32 x, f32 y) {{ return mul<{round}, {ftz}, none>(x, y); }})",
    ),
    Rule(
        f"fma{_ROUND}{_PAIR}",
        "d:f32x2 a:f32x2 b:f32x2 c:f32x2",
        "each(a, b, c, [](f32 x, f32 y, f32 z) {{ return fma<{round}, {ftz}, none>(x, y, z); }})",
    ),
    Rule("neg(ftz=.ftz)?.f32", "d:f32 a:f32", "negated(flush<{ftz}>(a))"),
    Rule("neg.f64", "d:f64 a:f64", "negated(a)"),
    Rule("abs(ftz=.ftz)?.f32", "d:f32 a:f32", "absolute(flush<{ftz}>(a))"),
    Rule("abs.f64", "d:f64 a:f64", "absolute(a)"),
    Rule("copysign(type=.f32|.f64)", "d:{type} a:{type} b:{type}", "copy_sign(a, b)"),
    Rule(
        "min(ftz=.ftz)?(nan=.NaN)?(xorsign=.xorsign.abs)?.f32",
        "d:f32 a:f32 b:f32",
        "minimum<{ftz}, {nan}, {xorsign}>(a, b)",
    ),
    Rule(
        "max(ftz=.ftz)?(nan=.NaN)?(xorsign=.xorsign.abs)?.f32",
        "d:f32 a:f32 b:f32",
        "maximum<{ftz}, {nan}, {xorsign}>(a, b)",
    ),
    Rule("min.f64", "d:f64 a:f64 b:f64", "minimum<none, none, none>(a, b)"),
    Rule("max.f64", "d:f64 a:f64 b:f64", "maximum<none, none, none>(a, b)"),
    # Three operands (sm_100 and up).
    Rule(
        "min(ftz=.ftz)?(nan=.NaN)?(abs=.abs)?.f32",
        "d:f32 a:f32 b:f32 c:f32",
        "minimum<{ftz}, {nan}, none>(minimum<{ftz}, {nan}, none>(magnitude<{abs}>(a), "
        "magnitude<{abs}>(b)), magnitude<{abs}>(c))",
    ),
    Rule(
        "max(ftz=.ftz)?(nan=.NaN)?(abs=.abs)?.f32",
        "d:f32 a:f32 b:f32 c:f32",
        "maximum<{ftz}, {nan}, none>(maximum<{ftz}, {nan}, none>(magnitude<{abs}>(a), "
        "magnitude<{abs}>(b)), magnitude<{abs}>(c))",
    ),
    Rule(f"div{_ROUND}(ftz=.ftz)?.f32", "d:f32 a:f32 b:f32", "div<{round}, {ftz}>(a, b)"),
    Rule("div(kind=.approx|.full)(ftz=.ftz)?.f32", "d:f32 a:f32 b:f32", "div<rn, {ftz}>(a, b)"),
    Rule(f"div{_ROUND}.f64", "d:f64 a:f64 b:f64", "div<{round}, none>(a, b)"),
    Rule(f"rcp{_ROUND}(ftz=.ftz)?.f32", "d:f32 a:f32", "div<{round}, {ftz}>(1.0f, a)"),
    Rule(f"rcp{_ROUND}.f64", "d:f64 a:f64", "div<{round}, none>(1.0, a)"),
    Rule(f"sqrt{_ROUND}(ftz=.ftz)?.f32", "d:f32 a:f32", "sqrt<{round}, {ftz}>(a)"),
    Rule(f"sqrt{_ROUND}.f64", "d:f64 a:f64", "sqrt<{round}, none>(a)"),
    Rule("rcp.approx(ftz=.ftz)?.f32", "d:f32 a:f32", "reciprocal_approximate<{ftz}>(a)"),
    Rule("sqrt.approx(ftz=.ftz)?.f32", "d:f32 a:f32", "sqrt_approximate<{ftz}>(a)"),
    Rule("rsqrt.approx(ftz=.ftz)?.f32", "d:f32 a:f32", "rsqrt_approximate<{ftz}>(a)"),
    Rule("rsqrt.approx.f64", "d:f64 a:f64", "1.0 / root(a)"),
    Rule("rcp.approx.ftz.f64", "d:f64 a:f64", "reciprocal_seed(a)"),
    Rule("rsqrt.approx.ftz.f64", "d:f64 a:f64", "rsqrt_seed(a)"),
    Rule("ex2.approx(ftz=.ftz)?.f32", "d:f32 a:f32", "exp2_approximate<{ftz}>(a)"),
    Rule("lg2.approx(ftz=.ftz)?.f32", "d:f32 a:f32", "log2_approximate<{ftz}>(a)"),
    Rule("sin.approx(ftz=.ftz)?.f32", "d:f32 a:f32", "sin_approximate<{ftz}>(a)"),
    Rule("cos.approx(ftz=.ftz)?.f32", "d:f32 a:f32", "cos_approximate<{ftz}>(a)"),
    Rule("tanh.approx.f32", "d:f32 a:f32", "tanh_approximate(a)"),
]
