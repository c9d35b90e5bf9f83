"""A kernel and the functions that it calls, as one C++ file.

Registers become local variables of one function, labels become labels, a guard an `if`. What an
instruction becomes is in the table (rules/), what an operand becomes in operands.py; here are
functions, calls and jumps.
"""

from typing import NamedTuple

from genkern.ptx.errors import UnsupportedPTX
from genkern.ptx.layout import SharedLayout, local_layout, parameters_of
from genkern.ptx.operands import Operands, c_name, register_type
from genkern.ptx.program import Call, Label, Symbol


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


def _signature(function):
    results = [f"u8* {c_name(p.name)}" for p in function.results]
    parameters = [f"const u8* {c_name(p.name)}" for p in function.parameters]
    return f"void {c_name(function.name)}({', '.join(['Thread& t', *results, *parameters])})"


class Translator(Operands):
    """One function. Its methods are what the rules use."""

    def __init__(self, program, function, table, layout, symbols):
        super().__init__(function, layout, symbols)
        self.program, self.table = program, table
        self.labels_seen = set()
        self.labels = {item.name for item in function.body if isinstance(item, Label)}

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
                lines.append(f"  alignas(16) u8 {c_name(variable.name)}[{variable.length}];")
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
                lines.append(f"{c_name(item.name)}:;")
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

    # Control flow.

    def jump(self, target, instruction):
        if not isinstance(target, Symbol) or target.name not in self.labels:
            raise UnsupportedPTX("a label of this function expected")
        goto = f"goto {c_name(target.name)};"
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
        arguments = ", ".join(["t", *(c_name(name) for name, _ in given)])
        return f"{c_name(function.name)}({arguments});"
