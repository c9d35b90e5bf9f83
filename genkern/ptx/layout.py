"""Where parameters, local and shared variables lie."""

from typing import NamedTuple

from genkern.ptx.program import Call, Label, Register, Symbol

# Shared memory starts there (runtime/thread.h); between variables lie bytes that nobody may touch.
SHARED_START = 1024
RED_ZONE = 16


class Parameter(NamedTuple):
    """Of a kernel: its type (b8 with more than a byte: a struct), bytes, alignment and place."""

    name: str
    type: str
    size: int
    alignment: int
    offset: int


def parameters_of(entry):
    found, offset = [], 0
    for p in entry.parameters:
        offset = -(-offset // p.alignment) * p.alignment
        found.append(Parameter(p.name, p.type, p.length, p.alignment, offset))
        offset += p.length
    return tuple(found)


def local_layout(function):
    """Where the .local variables of a function lie, and how many bytes they take."""
    places, offset = {}, 0
    for variable in function.variables:
        if variable.space == "local":
            offset = -(-offset // variable.alignment) * variable.alignment
            places[variable.name] = offset
            offset += variable.length
    return places, offset


class SharedLayout:
    """Places of the shared variables that some functions use."""

    def __init__(self, program, functions):
        self.places, self.holes = {}, []
        self.static_bytes, self.dynamic_alignment = 0, 1
        used = set()
        for function in functions:
            for item in function.body:
                if not isinstance(item, Label):
                    used |= {s.name for s in _symbols(item.operands)}
        variables = {v.name: v for f in functions for v in f.variables if v.space == "shared"}
        variables |= {v.name: v for v in program.variables.values() if v.space == "shared"}
        variables = [v for v in variables.values() if v.name in used]
        at = SHARED_START
        for v in sorted((v for v in variables if v.length), key=lambda v: -v.alignment):
            if at > SHARED_START:
                self.holes.append(at)
                at += RED_ZONE
            at = -(-at // v.alignment) * v.alignment
            if self.holes and isinstance(self.holes[-1], int):
                self.holes[-1] = (self.holes[-1] - SHARED_START, at - SHARED_START)
            self.places[v.name] = at
            at += v.length
            self.static_bytes = -(-self.static_bytes // v.alignment) * v.alignment + v.length
        dynamic = [v for v in variables if not v.length]
        self.dynamic_alignment = max([16] + [v.alignment for v in dynamic])
        if dynamic:
            if at > SHARED_START:
                start = at
                at = -(-(at + RED_ZONE) // self.dynamic_alignment) * self.dynamic_alignment
                self.holes.append((start - SHARED_START, at - SHARED_START))
            for v in dynamic:
                self.places[v.name] = at
        self.shared_bytes = at - SHARED_START


def _symbols(operands):
    for operand in operands:
        if isinstance(operand, Symbol):
            yield operand
        elif isinstance(operand, tuple) and not isinstance(operand, (Register, Call)):
            yield from _symbols(operand)
