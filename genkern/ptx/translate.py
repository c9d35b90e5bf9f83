"""A kernel and the functions that it calls, as one C++ file.

Registers become local variables of one function, labels become labels, a guard an `if`. What an
instruction becomes is in the table (rules/); here are operands, control flow, parameters, and where
variables lie.
"""

import re
import struct
from typing import NamedTuple

from genkern.ptx.errors import UnsupportedPTX
from genkern.ptx.layout import SharedLayout, local_layout, parameters_of
from genkern.ptx.parse import number
from genkern.ptx.program import (
    SIZES,
    Address,
    Call,
    Immediate,
    Label,
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


class Translation(NamedTuple):
    """symbols: the .global and .const variables, in the order of the table that the kernel gets.
    static_bytes: what the kernel declares; shared_bytes: with the red zones, which `holes` lists as
    (start, end) from the beginning of shared memory. dynamic_start: where dynamic memory begins."""

    cpp: str
    parameters: tuple
    symbols: tuple
    static_bytes: int
    shared_bytes: int
    holes: tuple
    dynamic_alignment: int
    local_bytes: int
    registers: int


def register_type(type_):
    """The C++ type of a register."""
    if type_ == "pred":
        return "bool"
    if SIZES[type_] > 8:
        raise UnsupportedPTX("registers of 128 bits are unknown")
    return f"u{8 * SIZES[type_]}"


def translate(program, name, table):
    """The `Translation` of a kernel of a parsed program. Raises `UnsupportedPTX`."""
    entry = program.functions[name]
    functions = _reached(program, entry)
    layout = SharedLayout(program, functions)
    symbols = tuple(v.name for v in program.variables.values() if v.space in ("global", "const"))
    bodies, declarations = [], []
    for function in reversed(functions):
        translator = Translator(program, function, table, layout, symbols)
        bodies.append(translator.translated())
        if function is not entry:
            declarations.append(_signature(function) + ";")
    local = sum(local_layout(f)[1] + 16 for f in functions)
    cpp = "\n".join(
        [
            '#include "kernel.h"',
            "namespace ptx {",
            "namespace {",
            *declarations,
            *bodies,
            "}",
            "}",
            'extern "C" void kernel(ptx::Thread& t, const ptx::u8* parameters) {',
            "  ptx::entry(t, parameters);",
            "}",
            "",
        ]
    )
    return Translation(
        cpp,
        parameters_of(entry),
        symbols,
        layout.static_bytes,
        layout.shared_bytes,
        tuple(layout.holes),
        layout.dynamic_alignment,
        # A function may call itself: room for some depth.
        local * (64 if _calls_itself(functions) else 1),
        sum(len(f.registers) for f in functions),
    )


def _calls(function):
    for item in function.body:
        if not isinstance(item, Label) and item.operands and isinstance(item.operands[0], Call):
            yield item.operands[0].function, item


def _reached(program, entry):
    """The entry, then every function that it may call."""
    found, todo = [entry], [entry]
    while todo:
        function = todo.pop()
        for name, instruction in _calls(function):
            if name not in program.functions:
                raise UnsupportedPTX(f"{name} has no body here", instruction.line, instruction.text)
            callee = program.functions[name]
            if callee not in found:
                found.append(callee)
                todo.append(callee)
    return found


def _calls_itself(functions):
    edges = {f.name: {name for name, _ in _calls(f)} for f in functions}
    for start in edges:
        seen, todo = set(), list(edges[start])
        while todo:
            name = todo.pop()
            if name == start:
                return True
            if name not in seen:
                seen.add(name)
                todo.extend(edges.get(name, ()))
    return False


def _c_name(name):
    return "v_" + re.sub(r"\W", lambda m: f"_{ord(m[0]):x}_", name)


def _signature(function):
    results = [f"u8* {_c_name(p.name)}" for p in function.results]
    parameters = [f"const u8* {_c_name(p.name)}" for p in function.parameters]
    return f"void {_c_name(function.name)}({', '.join(['Thread& t', *results, *parameters])})"


class Translator:
    """One function. Its methods are what the rules use."""

    def __init__(self, program, function, table, layout, symbols):
        self.program, self.function, self.table = program, function, table
        self.layout, self.symbols = layout, {name: i for i, name in enumerate(symbols)}
        self.local_places, self.local_bytes = local_layout(function)
        self.variables = {v.name: v for v in function.variables}
        self.variables |= {v.name: v for v in function.results + function.parameters}
        self.offsets = {p.name: p.offset for p in parameters_of(function)}
        self.labels_seen = set()
        self.labels = {item.name for item in function.body if isinstance(item, Label)}
        self.allows_wider = False

    # The function.

    def translated(self):
        lines = []
        if self.function.is_entry:
            lines.append("void entry(Thread& t, const u8* parameters) {")
        else:
            lines.append(_signature(self.function) + " {")
        by_type = {}
        for register in self.function.registers:
            by_type.setdefault(register_type(register.type), []).append(register.name)
        for type_, names in by_type.items():
            poison = {"bool": "false", "u8": "0xa5", "u16": "0x7fa5", "u32": "0x7fa5a5a5u"}
            value = poison.get(type_, "0x7ff5a5a5a5a5a5a5u")
            listed = ", ".join(f"{self.register(n)} = {value}" for n in names)
            lines.append(f"  {type_} {listed};")
        for variable in self.function.variables:
            if variable.space == "param":
                lines.append(f"  alignas(16) u8 {_c_name(variable.name)}[{variable.length}];")
        if self.local_bytes:
            alignment = max(v.alignment for v in self.function.variables if v.space == "local")
            lines.append("  const u32 local_before = t.local_top;")
            lines.append(
                f"  const u32 local_base = take_local(t, {self.local_bytes}, {alignment}, "
                f"{self.function.line});"
            )
        lines += self.blocks()
        lines.append(f"  {self.leave()}")
        lines.append("}")
        return "\n".join(lines)

    def blocks(self):
        """The body; each stretch without a label or jump adds its length to the steps first."""
        lines, block = [], []

        def close():
            if block:
                lines.append(f"  t.steps += {len(block)};")
                lines.extend(block)
                block.clear()

        for item in self.function.body:
            if isinstance(item, Label):
                close()
                if item.name in self.labels_seen:
                    raise UnsupportedPTX("a label that is there twice", item.line, item.name)
                self.labels_seen.add(item.name)
                lines.append(f"{_c_name(item.name)}:;")
                continue
            block.append(f"  {self.instruction(item)}")
            if item.opcode.split(".")[0] in ("bra", "brx", "ret", "exit", "trap", "call"):
                close()
        close()
        return lines

    def instruction(self, instruction):
        try:
            text = self.statement(instruction)
        except UnsupportedPTX as error:
            if error.line is not None:
                raise
            raise UnsupportedPTX(str(error), instruction.line, instruction.text) from None
        if instruction.guard is None:
            return text
        sign = "!" if instruction.guard_negated else ""
        return f"if ({sign}{self.register(instruction.guard.name)}) {{ {text} }}"

    def statement(self, instruction):
        found = self.table.find(instruction.opcode, len(instruction.operands))
        if found is None:
            raise UnsupportedPTX(
                f"no rule for {instruction.opcode} with {len(instruction.operands)} operands"
            )
        rule, words = found
        self.allows_wider = instruction.opcode.split(".")[0] == "cvt"
        if callable(rule.cpp):
            return rule.cpp(self, instruction, words)
        names = [part.split(":") for part in rule.operands.split()]
        types = [type_.format(**words) for _, type_ in names]
        inputs = " ".join(
            f"const {type_} {name} = {self.source(operand, type_)};"
            for (name, _), type_, operand in list(
                zip(names, types, instruction.operands, strict=True)
            )[1:]
        )
        assigned = self.assign(instruction.operands[0], types[0], rule.cpp.format(**words))
        return f"{{ {inputs} {assigned} }}"

    # Operands.

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
            return f"{_c_name(base.name)} + {offset}"
        if isinstance(base, Register) and not writes:
            return f"read_parameter(t, {self.address(operand)}, {size}, {instruction.line})"
        raise UnsupportedPTX("a parameter by its name expected")

    # Control flow.

    def jump(self, target, instruction):
        if not isinstance(target, Symbol) or target.name not in self.labels:
            raise UnsupportedPTX("a label of this function expected")
        goto = f"goto {_c_name(target.name)};"
        if target.name in self.labels_seen:
            return f"jump_back(t, {instruction.line}); {goto}"
        return goto

    def leave(self):
        return "t.local_top = local_before; return;" if self.local_bytes else "return;"

    def call(self, instruction):
        (call,) = instruction.operands
        function = self.program.functions[call.function]
        given = [(name, self.variables[name]) for name in call.results + call.arguments]
        wanted = function.results + function.parameters
        if [v.length for _, v in given] != [v.length for v in wanted]:
            raise UnsupportedPTX(f"parameters of other sizes than those of {call.function}")
        arguments = ", ".join(["t", *(_c_name(name) for name, _ in given)])
        return f"{_c_name(function.name)}({arguments});"


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
