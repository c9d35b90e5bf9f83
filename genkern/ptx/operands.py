"""Operands of PTX as C++: registers, constants, addresses, parameters.

`Operands` is the half of a function's translator (translate.py) that the rules (rules/) ask for
values and for places.
"""

import re
import struct

from genkern.ptx.errors import UnsupportedPTX
from genkern.ptx.layout import local_layout, parameters_of
from genkern.ptx.parse import number
from genkern.ptx.program import (
    SIZES,
    Address,
    Immediate,
    Negated,
    Register,
    Sink,
    Special,
    Symbol,
)

_FLOATS = {"f32": "u32", "f64": "u64"}
_HALVES = ("f16", "bf16")
_PAIRS = {"f16x2": "u32", "bf16x2": "u32", "f32x2": "u64"}
_SPECIALS = {
    "%laneid": "t.lane",
    "%warpid": "t.warp",
    "%nwarpid": "((t.ntid[0] * t.ntid[1] * t.ntid[2] + 31) / 32)",
    "%smid": "0u",
    "%nsmid": "1u",
    "%gridid": "0u",
    "%lanemask_eq": "(1u << t.lane)",
    "%lanemask_lt": "((1u << t.lane) - 1)",
    "%lanemask_le": "((2u << t.lane) - 1)",
    "%lanemask_gt": "(~((2u << t.lane) - 1))",
    "%lanemask_ge": "(~((1u << t.lane) - 1))",
    "%clock": "u32(clock_now())",
    "%clock_hi": "u32(clock_now() >> 32)",
    "%clock64": "clock_now()",
    "%globaltimer": "clock_now()",
    "%globaltimer_lo": "u32(clock_now())",
    "%total_smem_size": "t.shared_bytes",
    "%aggr_smem_size": "t.shared_bytes",
    "%dynamic_smem_size": "t.dynamic_bytes",
}


def register_type(type_):
    """The C++ type of a register."""
    if type_ == "pred":
        return "bool"
    if SIZES[type_] > 8:
        raise UnsupportedPTX("registers of 128 bits are unknown")
    return f"u{8 * SIZES[type_]}"


def c_name(name):
    return "v_" + re.sub(r"\W", lambda m: f"_{ord(m[0]):x}_", name)


class Operands:
    """Those of one function. Its methods are what the rules use."""

    def __init__(self, function, layout, symbols):
        self.function = function
        self.layout, self.symbols = layout, {name: i for i, name in enumerate(symbols)}
        self.local_places, self.local_bytes = local_layout(function)
        self.variables = {v.name: v for v in function.variables}
        self.variables |= {v.name: v for v in function.results + function.parameters}
        self.offsets = {p.name: p.offset for p in parameters_of(function)}
        self.allows_wider = False

    def register(self, name):
        return "r_" + re.sub(r"\W", "_", name)

    def source(self, operand, type_):
        """The C++ value of an operand, of that type."""
        if isinstance(operand, Register):
            return self.register_value(operand, type_)
        if isinstance(operand, Immediate):
            return self.immediate(operand.text, type_)
        if isinstance(operand, Special):
            return f"{self.integer_type(type_)}({self.special(operand)})"
        if isinstance(operand, Symbol):
            return f"{self.integer_type(type_)}({self.address_of(operand)})"
        if isinstance(operand, Negated) and type_ == "pred":
            return "!" + self.source(operand.register, type_)
        raise UnsupportedPTX(f"an operand of another form, {operand}")

    def integer_type(self, type_):
        if "f" in type_ or type_ == "pred":
            raise UnsupportedPTX("an integer type expected")
        return type_

    def special(self, operand):
        name, _, axis = operand.name.partition(".")
        if axis:
            return f"t.{name[1:]}[{'xyz'.index(axis)}]"
        return _SPECIALS[name]

    def register_value(self, register, type_):
        name = self.register(register.name)
        if (type_ == "pred") != (register.type == "pred"):
            raise UnsupportedPTX(f"a register of type {register.type} where {type_} is expected")
        if type_ == "pred":
            return name
        size = 8 if type_ == "f32x2" else SIZES[type_]
        has = SIZES[register.type]
        if has != size:
            if not (self.allows_wider and has > size):
                raise UnsupportedPTX(f"a register of type {register.type} for {type_}")
            name = f"u{8 * size}({name})"
        return from_bits(name, type_)

    def source_wide(self, operand, type_):
        """As `source`; the register may be wider than the type, as st allows."""
        self.allows_wider = True
        return self.source(operand, type_)

    def constant(self, operand):
        return number(operand.text)

    def immediate(self, text, type_):
        is_float = type_ in ("f32", "f64")
        if text[:2] in ("0f", "0F", "0d", "0D"):
            single, bits = text[1] in "fF", int(text[2:], 16)
            if type_ == "f64" and single:
                value = struct.unpack("<f", struct.pack("<I", bits))[0]
                bits, single = struct.unpack("<Q", struct.pack("<d", value))[0], False
            elif type_ == "f32" and not single:
                value = struct.unpack("<d", struct.pack("<Q", bits))[0]
                bits, single = struct.unpack("<I", struct.pack("<f", value))[0], True
            size = 8 if type_ == "f32x2" else SIZES.get(type_, 0)
            if size != (4 if single else 8):
                raise UnsupportedPTX(f"the constant {text} for {type_}")
            suffix = "u" if single else "ull"
            return from_bits(f"u{32 if single else 64}({bits:#x}{suffix})", type_)
        if "." in text or (is_float and "e" in text.lower() and "x" not in text.lower()):
            if not is_float:
                raise UnsupportedPTX(f"the constant {text} for {type_}")
            return f"{type_}({float(text)!r})"
        value = number(text)
        if type_ == "pred":
            return "true" if value else "false"
        if is_float:
            return f"{type_}({value})"
        bits = 64 if type_ == "f32x2" else 8 * SIZES[type_]
        if not -(1 << bits) < value < (1 << bits):
            raise UnsupportedPTX(f"the constant {text} does not fit into {type_}")
        return from_bits(f"u{bits}({value % (1 << bits):#x}{'ull' if bits == 64 else 'u'})", type_)

    def assign(self, operand, type_, value):
        """The statement that gives a register a value of that type."""
        if isinstance(operand, Sink):
            return f"(void)({value});"
        if not isinstance(operand, Register):
            raise UnsupportedPTX("a register to write expected")
        if (type_ == "pred") != (operand.type == "pred"):
            raise UnsupportedPTX(f"a register of type {operand.type} for a result of type {type_}")
        name = self.register(operand.name)
        if type_ == "pred":
            return f"{name} = bool({value});"
        size = 8 if type_ == "f32x2" else SIZES[type_]
        has = SIZES[operand.type]
        if has < size or (has > size and not self.allows_wider):
            raise UnsupportedPTX(f"a register of type {operand.type} for a result of type {type_}")
        return f"{name} = u{8 * has}({to_bits(value, type_)});"

    def assign_wide(self, operand, type_, value):
        """As `assign`; the register may be wider than the type, as ld allows."""
        self.allows_wider = True
        return self.assign(operand, type_, value)

    # Addresses.

    def address(self, operand):
        """The 64-bit value of [base + offset]."""
        if not isinstance(operand, Address):
            raise UnsupportedPTX("an address in brackets expected")
        base, offset = operand
        if isinstance(base, Immediate):
            return f"u64({number(base.text) + offset}ull)"
        if isinstance(base, Symbol):
            return f"(u64({self.address_of(base)}) + u64({offset}ll))"
        if not isinstance(base, Register):
            raise UnsupportedPTX("an address in a register expected")
        name = self.register(base.name)
        if SIZES[base.type] == 4:
            return f"u64(u32({name} + u32({offset}ll)))"
        if SIZES[base.type] != 8:
            raise UnsupportedPTX(f"an address in a register of type {base.type}")
        return f"({name} + u64({offset}ll))"

    def address_of(self, symbol):
        """The address of a variable in its own space."""
        name, offset = symbol
        if name in self.local_places:
            return f"(local_base + {self.local_places[name] + offset})"
        if name in self.layout.places:
            return str(self.layout.places[name] + offset) + "u"
        if name in self.symbols:
            return f"(t.symbols[{self.symbols[name]}] + {offset})"
        if name in self.offsets and self.function.is_entry:
            return f"(u64(reinterpret_cast<uintptr_t>(parameters)) + {self.offsets[name] + offset})"
        raise UnsupportedPTX(f"the address of {name} is unknown")

    def parameter(self, operand, size, instruction, writes):
        """A pointer to bytes of a .param variable."""
        if not isinstance(operand, Address):
            raise UnsupportedPTX("an address in brackets expected")
        base, offset = operand
        if isinstance(base, Symbol) and base.name in self.variables:
            variable = self.variables[base.name]
            offset += base.offset
            if not 0 <= offset <= variable.length - size:
                raise UnsupportedPTX(f"bytes outside the parameter {base.name}")
            if base.name in self.offsets and self.function.is_entry:
                if writes:
                    raise UnsupportedPTX("a kernel's parameters may only be read")
                return f"parameters + {self.offsets[base.name] + offset}"
            return f"{c_name(base.name)} + {offset}"
        if isinstance(base, Register) and not writes:
            return f"read_parameter(t, {self.address(operand)}, {size}, {instruction.line})"
        raise UnsupportedPTX("a parameter by its name expected")


def from_bits(value, type_):
    """Unsigned bits as a value of a type."""
    if type_ in _FLOATS or type_ in _PAIRS:
        return f"__builtin_bit_cast({type_}, {value})"
    if type_ in _HALVES:
        return f"{type_}{{{value}}}"
    return f"{type_}({value})"


def to_bits(value, type_):
    """A value of a type as bits; a signed one extends its sign where the register is wider."""
    if type_ in _FLOATS:
        return f"__builtin_bit_cast({_FLOATS[type_]}, {type_}({value}))"
    if type_ in _PAIRS:
        return f"__builtin_bit_cast({_PAIRS[type_]}, {value})"
    if type_ in _HALVES:
        return f"({value}).bits"
    return f"{type_}({value})"
