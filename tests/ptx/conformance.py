"""Runs single instructions on many operands and compares with what they should give.

A case is an instruction, the types of its registers, and a function from the operands' bits to the
expected bits, written without the executor. All cases of a list become one kernel, a thread for
each set of operands.
"""

import random
from dataclasses import dataclass, field

import numpy as np
import ptx_exact as exact

from genkern import ptx
from genkern.ptx import rules
from genkern.ptx.rules import Table

THREADS = 128
# Of the tests alone, so that it tells at the end which rules they have used.
TABLE = Table(rules.TABLE.rules)
# Further arguments of every `Module` that the tests make: how the mutations get in.
MODULE_OPTIONS = {"table": TABLE}
_SIZES = {"pred": 1, "b16": 16, "b32": 32, "b64": 64}


@dataclass
class Case:
    """text: the instruction with {d} and {a}, {b}, … for registers. d, operands: their types, pred,
    b16, b32 or b64. kinds: what lies in each operand: an integer's bits, or f16, bf16, f32, f64, or
    a list of values to draw from. expected: from the operands' bits to bits; exact.NAN for any NaN,
    None where PTX leaves it open. result: the format that decides what a NaN is. before: PTX that
    comes first. tolerance: of an approximate result, relative."""

    text: str
    d: str
    operands: tuple
    kinds: tuple
    expected: object
    result: str = ""
    before: str = ""
    tolerance: float = 0.0
    rows: list = field(default_factory=list)


def draws(kind, count, rng):
    """Bits of a kind: the special ones first, then random ones."""
    if isinstance(kind, (list, tuple)):
        return [rng.choice(kind) for _ in range(count)]
    if kind in exact.FORMATS:
        form = exact.FORMATS[kind]
        one = (0 - form.least + 1) << form.mantissa
        special = [0, form.sign, one, one | form.sign, form.infinity, form.infinity | form.sign]
        special += [form.infinity + (1 << (form.mantissa - 1)), 1, form.sign | 1]
        special += [form.infinity - 1, form.sign | form.infinity - 1, 1 << form.mantissa]
        special += [(1 << form.mantissa) - 1, one + 1, one - 1]
        found = [rng.choice(special) for _ in range(count // 4)]
        while len(found) < count:
            if rng.random() < 0.2:
                found.append(rng.getrandbits(form.bits))
            else:  # near one, so that sums round
                exponent = (0 - form.least + 1) + rng.randrange(-form.digits, form.digits)
                exponent = min(max(exponent, 1), form.greatest - form.least)
                bits = rng.getrandbits(1) << (form.bits - 1) | exponent << form.mantissa
                mantissa = rng.getrandbits(form.mantissa)
                if rng.random() < 0.4:  # halfway between two numbers of a shorter format
                    short = rng.choice([s for s in (1, 4, 12, 15, 28, 41, 44) if s < form.mantissa])
                    mantissa = mantissa >> short << short
                found.append(bits | mantissa)
        rng.shuffle(found)
        return found
    bits = int(kind)
    special = [0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 2, 31, 32, 33]
    special = [s & ((1 << bits) - 1) for s in special]
    found = [
        rng.choice(special) if rng.random() < 0.3 else rng.getrandbits(rng.randrange(1, bits + 1))
        for _ in range(count)
    ]
    return found


def kernel_of(cases, target="sm_100"):
    """The PTX of all cases."""
    lines = [
        ".version 8.6",
        f".target {target}",
        ".address_size 64",
        ".visible .entry conformance(.param .u64 inputs, .param .u64 outputs)",
        "{",
        ".reg .b64 %base, %out, %thread;",
        ".reg .b32 %tid;",
        ".reg .b32 %whole;",
        "ld.param.u64 %base, [inputs];",
        "ld.param.u64 %out, [outputs];",
        "mov.u32 %tid, %tid.x;",
        "mul.wide.u32 %thread, %tid, 8;",
        "add.s64 %base, %base, %thread;",
        "add.s64 %out, %out, %thread;",
    ]
    inputs = 0
    for i, case in enumerate(cases):
        lines.append("{")
        names = {}
        for name, type_ in zip("abcef", case.operands, strict=False):
            names[name] = f"%{name}"
            lines.append(f".reg .{type_} %{name};")
            place = f"[%base+{inputs * THREADS * 8}]"
            if type_ == "pred":
                lines.append(f"ld.global.b32 %whole, {place};")
                lines.append(f"setp.ne.b32 %{name}, %whole, 0;")
            else:
                lines.append(f"ld.global.{type_} %{name}, {place};")
            inputs += 1
        place = f"[%out+{i * THREADS * 8}]"
        lines.append(f".reg .{case.d} %d;")
        lines.append(".reg .pred %q;")
        if case.before:
            lines.append(case.before.format(d="%d", q="%q", **names))
        lines.append(case.text.format(d="%d", q="%q", **names) + ";")
        if case.d == "pred":
            lines.append("selp.b32 %whole, 1, 0, %d;")
            lines.append(f"st.global.b32 {place}, %whole;")
        else:
            lines.append(f"st.global.{case.d} {place}, %d;")
        lines.append("}")
    lines += ["ret;", "}"]
    return "\n".join(lines)


def operands_of(cases, seed=0):
    """Draws the operands of every case: rows of bits, THREADS of them."""
    rng = random.Random(seed)
    for case in cases:
        columns = [draws(kind, THREADS, rng) for kind in case.kinds]
        case.rows = list(zip(*columns, strict=True))


def mismatches(cases):
    """Texts about every case whose results are not the expected ones."""
    operands_of(cases)
    module = ptx.Module(kernel_of(cases), **MODULE_OPTIONS)
    count = sum(len(case.operands) for case in cases)
    inputs = np.zeros((count, THREADS), np.uint64)
    at = 0
    for case in cases:
        for column in zip(*case.rows, strict=True):
            inputs[at] = column
            at += 1
    outputs = np.zeros((len(cases), THREADS), np.uint64)
    inputs.flags.writeable = False
    module.launch("conformance", 1, THREADS, [inputs, outputs])
    found = []
    for case, row in zip(cases, outputs, strict=True):
        for operands, got in zip(case.rows, row, strict=True):
            wanted = case.expected(*operands)
            if wanted is not None and not _same(case, int(got), wanted):
                shown = ", ".join(f"{o:#x}" for o in operands)
                wanted = wanted if isinstance(wanted, str) else f"{wanted:#x}"
                found.append(f"{case.text}: of {shown} gives {int(got):#x}, not {wanted}")
                break
    return found


def _same(case, got, wanted):
    if wanted == exact.NAN:
        return exact.is_nan_bits(got, case.result)
    if got == wanted:
        return True
    if not case.tolerance:
        return False
    a, b = exact.decode(got, case.result), exact.decode(wanted, case.result)
    if not exact.is_finite(a) or not exact.is_finite(b):
        return False
    a, b = exact.number(a), exact.number(b)
    return abs(a - b) <= case.tolerance * abs(b)


def masked(value, bits):
    return value & ((1 << bits) - 1)


def signed(value, bits):
    value = masked(value, bits)
    return value - (1 << bits) if value >> (bits - 1) else value


def kernel_text(body, parameters, shared="", target="sm_100"):
    """A kernel "k" around some PTX. It has registers %r0…, %rd0…, %f0…, %h0… (b16), %p0…;
    parameters go into %rd1, %rd2, … (u64) in their order, %tid.x into %r0, %ctaid.x into %r1."""
    listed = ", ".join(f".param .u64 p{i}" for i in range(1, parameters + 1))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(1, parameters + 1))
    return f"""
.version 8.6
.target {target}
.address_size 64
.visible .entry k({listed})
{{
.reg .b32 %r<64>;
.reg .b64 %rd<64>;
.reg .f32 %f<32>;
.reg .b16 %h<32>;
.reg .pred %p<16>;
{shared}
{loads}
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
{body}
ret;
}}
"""


def run(body, *arrays, grid=1, block=32, shared="", target="sm_100", **options):
    """Runs `kernel_text`; arrays are its parameters. Returns the `Result`."""
    module = ptx.Module(kernel_text(body, len(arrays), shared, target), **MODULE_OPTIONS)
    return module.launch("k", grid, block, list(arrays), **options)


def own(base, size, register="%rd10"):
    """PTX that puts the address of the thread's own element, base + size·tid, into a register."""
    return f"mul.wide.u32 {register}, %r0, {size};\nadd.s64 {register}, {register}, {base};\n"
