"""What PTX text says: operands, instructions, variables, functions. parse.py makes them of it."""

from dataclasses import dataclass, field
from typing import NamedTuple

# Bytes of the fundamental types; predicates have none.
SIZES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "b128": 16,
    "f16": 2,
    "bf16": 2,
    "f16x2": 4,
    "bf16x2": 4,
    "f32": 4,
    "f64": 8,
    "pred": 0,
}


class Register(NamedTuple):
    name: str  # unique in its function
    type: str


class Immediate(NamedTuple):
    text: str


class Special(NamedTuple):
    """A register that the machine fills: %tid.x, %laneid, …"""

    name: str


class Symbol(NamedTuple):
    """A variable, parameter, label or function, by its name."""

    name: str
    offset: int = 0


class Address(NamedTuple):
    base: object  # Register, Symbol or Immediate
    offset: int


class Vector(NamedTuple):
    elements: tuple


class Pair(NamedTuple):
    """Two destinations, a|b."""

    first: object
    second: object


class Negated(NamedTuple):
    register: object


class Sink(NamedTuple):
    """The destination _, which drops the value."""


class Call(NamedTuple):
    """Operands of a direct call; results and arguments are names of .param variables."""

    results: tuple
    function: str
    arguments: tuple


@dataclass
class Instruction:
    line: int
    opcode: str
    operands: tuple
    guard: Register | None
    guard_negated: bool
    text: str


@dataclass
class Label:
    line: int
    name: str


@dataclass
class Variable:
    """space: param, shared, local, global or const. length: bytes, None where the launch tells.
    data: the first bytes, the rest is zero; None where nothing is said."""

    name: str
    space: str
    type: str
    alignment: int
    length: int | None
    line: int
    data: bytes | None = None


@dataclass
class Function:
    name: str
    line: int
    is_entry: bool
    results: list
    parameters: list
    registers: list = field(default_factory=list)
    variables: list = field(default_factory=list)
    targets: dict = field(default_factory=dict)  # tables of labels for brx.idx
    body: list = field(default_factory=list)
    threads: tuple | None = None  # what .reqntid demands
    max_threads: int | None = None


@dataclass
class Program:
    target: str
    functions: dict
    variables: dict
