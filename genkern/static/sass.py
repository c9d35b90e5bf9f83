"""Machine code as cuobjdump prints it: instructions, loops, and which of them is the inner one.

A loop is what a branch back encloses. The inner loop of a kernel is one that holds instructions of
tensor cores (of a kernel without any: multiply-adds; without these: accesses to global memory) and
no other loop that does. Of several the one with the most of them counts, and of equals the
shortest: a kernel with a loop for whole tiles and one for tiles at an edge spends its time in the
former.
"""

import re
from collections import Counter
from typing import NamedTuple

# "/*0a10*/   @!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;"
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", re.M)
_FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.M)

_CLASSES = {
    "tensor": "HMMA BMMA IMMA DMMA QMMA OMMA HGMMA QGMMA IGMMA UTCHMMA UTCQMMA UTCOMMA UTCIMMA",
    "local": "LDL STL",
    "shared": "LDS LDSM STS STSM ATOMS LDT LDTM STT STTM",
    "global": "LDG STG LDGSTS LD ST RED REDG ATOM ATOMG UBLKCP UTMALDG UTMASTG UTMAREDG",
    "multiply-add": "FFMA FFMA2 HFMA2 DFMA",
    "float": "FADD FADD2 FMUL FMUL2 FMNMX FMNMX3 FSETP FSEL FSET FCHK HADD2 HMUL2 HMNMX2 HSETP2 "
    "HSET2 DADD DMUL DSETP DMNMX MUFU F2F F2FP F2I I2F I2FP FRND",
    "control": "BRA BRX EXIT RET CALL BSSY BSYNC BREAK WARPSYNC BAR NOP DEPBAR LDGDEPBAR YIELD "
    "MEMBAR ERRBAR CCTL BMOV JMP BPT NANOSLEEP SYNCS",
}
CLASS_OF = {name: kind for kind, names in _CLASSES.items() for name in names.split()}
MEMORY = ("local", "shared", "global")


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: str

    @property
    def kind(self):
        """tensor, local, shared, global, multiply-add, float, control, or other (whole numbers,
        moves, predicates)."""
        return CLASS_OF.get(self.opcode.partition(".")[0], "other")


class Loop(NamedTuple):
    """count: instructions by kind, predicated ones too. is_loop: False where the kernel has no
    loop of the kind, and this is all of it."""

    count: Counter
    is_loop: bool = True

    @property
    def tensor(self):
        return self.count["tensor"]

    @property
    def memory(self):
        return sum(self.count[kind] for kind in MEMORY)

    @property
    def all(self):
        return sum(self.count.values())

    def plain(self):
        """As JSON can keep it."""
        return {"count": dict(self.count), "is_loop": self.is_loop}

    @classmethod
    def of_plain(cls, values):
        return cls(Counter(values["count"]), values["is_loop"])

    @property
    def rest(self):
        """Neither tensor cores nor memory."""
        return self.all - self.tensor - self.memory


def functions(text):
    """{mangled name: instructions} of what `cuobjdump -sass` printed."""
    names = list(_FUNCTION.finditer(text))
    ends = [match.start() for match in names[1:]] + [len(text)]
    return {
        name[1]: [
            Instruction(int(found[1], 16), found[2], found[3].strip())
            for found in _INSTRUCTION.finditer(text, name.end(), end)
        ]
        for name, end in zip(names, ends, strict=True)
    }


def loops(instructions):
    """Of every branch back the addresses (first, last); of several to one place the longest."""
    found = {}
    for one in instructions:
        if one.opcode.split(".")[0] != "BRA" or not (to := re.search(r"0x([0-9a-f]+)", one[2])):
            continue
        start = int(to[1], 16)
        if start < one.address:  # a branch to itself is the padding behind a kernel's end
            found[start] = max(found.get(start, 0), one.address)
    return sorted(found.items())


def inner_loops(instructions, kind):
    """Every loop that holds such instructions and no other loop that does."""
    counts = {
        span: Counter(x.kind for x in instructions if span[0] <= x.address <= span[1])
        for span in loops(instructions)
    }
    holding = [span for span, count in counts.items() if count[kind]]
    return [
        Loop(counts[span])
        for span in holding
        if not any(
            other != span and span[0] <= other[0] and other[1] <= span[1] for other in holding
        )
    ]


def inner_loop(instructions):
    """The `Loop` that the module's text describes."""
    for kind in ("tensor", "multiply-add", "global"):
        if inner := inner_loops(instructions, kind):
            return min(inner, key=lambda loop: (-loop.count[kind], loop.all))
        if kind == "tensor" and any(x.kind == "tensor" for x in instructions):
            break  # unrolled: its loops are not where the work is
    return Loop(Counter(x.kind for x in instructions), is_loop=False)
