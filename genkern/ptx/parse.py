"""PTX text -> functions, variables and instructions, nothing interpreted yet.

Register names are resolved here (a name may be declared again in an inner scope); everything that
this file does not know is refused with its line.
"""

import re

from genkern.ptx.errors import UnsupportedPTX
from genkern.ptx.program import (
    SIZES,
    Address,
    Call,
    Function,
    Immediate,
    Instruction,
    Label,
    Negated,
    Pair,
    Program,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)

_BLANK = re.compile(r"(?:\s+|//[^\n]*|/\*.*?\*/)+", re.DOTALL)
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_STATEMENT = re.compile(r'(?:[^;"]|"[^"]*")*;')
_GUARD = re.compile(r"@(!?)\s*([\w$%]+)\s+")
_HEADER = re.compile(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(entry|func)\b")
_NAME = re.compile(r"[A-Za-z_$%][\w$]*")
_NUMBER = re.compile(
    r"[-+]?(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?"
    r"|\d+\.\d*(?:[eE][-+]?\d+)?|\d+U?)"
)
_SPECIAL = re.compile(
    r"%(?:(?:tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid|nwarpid|smid|nsmid|gridid"
    r"|lanemask_(?:eq|le|lt|ge|gt)|clock|clock_hi|clock64|globaltimer|globaltimer_lo"
    r"|total_smem_size|dynamic_smem_size|aggr_smem_size)"
)
_SKIPPED = re.compile(r"\.(?:version|address_size|file|loc|pragma)\b")


class _Scope:
    """The registers and .param variables that a pair of braces declares."""

    def __init__(self, outer, number):
        self.outer, self.number = outer, number
        self.names, self.families = {}, {}

    def find(self, name):
        scope = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            match = re.fullmatch(r"(.*?[^\d])(\d+)", name)
            if match and match[1] in scope.families and not match[2].startswith("00"):
                type_, count = scope.families[match[1]]
                if int(match[2]) < count:
                    return Register(_identifier(name, scope.number), type_)
            scope = scope.outer
        return None


def _identifier(name, scope):
    plain = name.replace("%", "r_").replace("$", "S_")
    return f"{plain}_{scope}" if scope else plain


def parse(text):
    """The `Program` of PTX text. Raises `UnsupportedPTX`."""
    return _Parser(text).program()


def number(text):
    """The value of an integer constant of PTX."""
    text = text.rstrip("U")
    sign, digits = (-1, text[1:]) if text[0] == "-" else (1, text.lstrip("+"))
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    return sign * int(digits, 8 if octal else 0)


class _Parser:
    def __init__(self, text):
        self.text, self.at = text, 0
        self.line, self.line_at = 1, 0
        self.target, self.functions, self.variables = "", {}, {}

    # Reading.

    def line_here(self):
        self.line += self.text.count("\n", self.line_at, self.at)
        self.line_at = self.at
        return self.line

    def skip_blank(self):
        match = _BLANK.match(self.text, self.at)
        if match:
            self.at = match.end()

    def starts(self, prefix):
        return self.text.startswith(prefix, self.at)

    def statement(self):
        match = _STATEMENT.match(self.text, self.at)
        if not match:
            self.refuse("a statement without its semicolon")
        text = match[0][:-1]
        self.at = match.end()
        return _BLANK.sub(" ", text).strip() if ("\n" in text or "/" in text) else text.strip()

    def rest_of_line(self):
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def refuse(self, message, text=None, line=None):
        if text is None:
            text = self.text[self.at : self.at + 80].split("\n")[0].strip()
        raise UnsupportedPTX(message, line or self.line_here(), text)

    # The module.

    def program(self):
        while True:
            self.skip_blank()
            if self.at >= len(self.text):
                break
            line = self.line_here()
            if self.starts(".target"):
                self.target = self.text[self.at : self.text.index("\n", self.at)].split()[1]
                self.target = self.target.rstrip(",")
                self.rest_of_line()
            elif self.starts(".section"):
                self.at = self.text.index("}", self.at) + 1
            elif _SKIPPED.match(self.text, self.at):
                self.rest_of_line()
            elif header := _HEADER.match(self.text, self.at):
                self.at = header.end()
                self.function(header[1] == "entry", line)
            else:
                statement = self.statement()
                for variable in self.declaration(statement, line):
                    self.variables[variable.name] = variable
        return Program(self.target, self.functions, self.variables)

    def parenthesised(self):
        end = self.text.index(")", self.at)
        text = _BLANK.sub(" ", self.text[self.at + 1 : end])
        self.at = end + 1
        self.skip_blank()
        return text

    def parameters(self, text, line):
        return [self.one_declaration(part.strip(), line) for part in _split(text)]

    def function(self, is_entry, line):
        self.skip_blank()
        results = []
        if self.starts("("):
            results = self.parameters(self.parenthesised(), line)
        name = _NAME.match(self.text, self.at)
        if not name:
            self.refuse("a function without a name")
        self.at = name.end()
        self.skip_blank()
        parameters = []
        if self.starts("("):
            parameters = self.parameters(self.parenthesised(), line)
        function = Function(name[0], line, is_entry, results, parameters)
        while not self.starts("{"):
            if self.starts(";"):  # a prototype
                self.at += 1
                return
            match = re.compile(
                r"\.(maxntid|reqntid|minnctapersm|maxnreg|maxnctapersm|noreturn)((?:\s*,?\s*\d+)*)"
            ).match(self.text, self.at)
            if not match:
                self.refuse("an unknown directive of a function")
            sizes = [int(word) for word in re.findall(r"\d+", match[2])]
            if match[1] == "reqntid":
                function.threads = tuple(sizes + [1] * (3 - len(sizes)))
            elif match[1] == "maxntid":
                function.max_threads = 1
                for size in sizes:
                    function.max_threads *= size
            self.at = match.end()
            self.skip_blank()
        self.body(function)
        self.functions[function.name] = function

    # A function's body.

    def body(self, function):
        self.at += 1
        scope, scopes = _Scope(None, 0), 0
        for parameter in function.results + function.parameters:
            scope.names[parameter.name] = parameter
        while True:
            self.skip_blank()
            line = self.line_here()
            if self.starts("{"):
                self.at += 1
                scopes += 1
                scope = _Scope(scope, scopes)
            elif self.starts("}"):
                self.at += 1
                scope = scope.outer
                if scope is None:
                    return
            elif _SKIPPED.match(self.text, self.at):
                self.rest_of_line()
            elif self.starts(";"):
                self.at += 1
            elif label := _LABEL.match(self.text, self.at):
                self.at = label.end()
                self.skip_blank()
                if self.starts(".branchtargets"):
                    names = self.statement()[len(".branchtargets") :].split(",")
                    function.targets[label[1]] = [name.strip() for name in names]
                else:
                    function.body.append(Label(line, label[1]))
            elif self.at >= len(self.text):
                self.refuse("the text ends inside a function")
            else:
                self.in_function(function, scope, line)

    def in_function(self, function, scope, line):
        statement = self.statement()
        if statement.startswith(".reg"):
            self.registers(function, scope, statement, line)
        elif statement.startswith("."):
            for variable in self.declaration(statement, line):
                plain = variable.name
                if variable.space in ("param", "local") and scope.number:
                    variable.name = _identifier(plain, scope.number)
                scope.names[plain] = variable
                function.variables.append(variable)
        else:
            function.body.append(self.instruction(function, scope, statement, line))

    def registers(self, function, scope, statement, line):
        match = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", statement)
        if not match or match[1] not in SIZES:
            self.refuse("an unknown declaration of registers", statement, line)
        for name in match[2].split(","):
            family = re.fullmatch(r"\s*([\w$%]+)<(\d+)>\s*", name)
            if family:
                scope.families[family[1]] = match[1], int(family[2])
                continue
            name = name.strip()
            register = Register(_identifier(name, scope.number), match[1])
            scope.names[name] = register

    def instruction(self, function, scope, statement, line):
        guard, negated, rest = None, False, statement
        if match := _GUARD.match(statement):
            guard, negated = scope.find(match[2]), match[1] == "!"
            if not isinstance(guard, Register) or guard.type != "pred":
                self.refuse("the guard is not a predicate register", statement, line)
            self.use(function, guard)
            rest = statement[match.end() :]
        opcode, _, operands = rest.partition(" ")
        if "\t" in opcode:
            opcode, _, operands = rest.partition("\t")
        if not re.fullmatch(r"[a-z][\w.:]*", opcode):
            self.refuse("not an instruction", statement, line)
        if opcode.split(".")[0] == "call":
            parsed = (self.call(scope, operands, statement, line),)
        else:
            parts = _split(operands)
            parsed = tuple(self.operand(function, scope, part, statement, line) for part in parts)
        return Instruction(line, opcode, parsed, guard, negated, statement)

    def use(self, function, register):
        if register not in self.used_registers(function):
            self.used_registers(function).add(register)
            function.registers.append(register)

    def used_registers(self, function):
        if getattr(self, "_used_by", None) is not function:
            self._used_by, self._used = function, set()
        return self._used

    def call(self, scope, operands, statement, line):
        match = re.fullmatch(
            r"(?:\(([^()]*)\)\s*,\s*)?([\w$]+)\s*(?:,\s*\(([^()]*)\)\s*)?", operands
        )
        if not match:
            self.refuse("only direct calls are known", statement, line)

        def names(text):
            found = []
            for name in _split(text or ""):
                variable = scope.find(name)
                if not isinstance(variable, Variable):
                    self.refuse(f"{name} is no .param variable", statement, line)
                found.append(variable.name)
            return tuple(found)

        return Call(names(match[1]), match[2], names(match[3]))

    def operand(self, function, scope, text, statement, line):
        if text.startswith("{"):
            inner = _split(text[1:-1])
            return Vector(tuple(self.operand(function, scope, p, statement, line) for p in inner))
        if text.startswith("["):
            inner = text[1:-1].strip()
            match = re.fullmatch(r"([\w$%]+)\s*(?:\+\s*(-?\s*\w+)|(-\s*\d+))?", inner)
            if not match:
                self.refuse("an unknown form of address", statement, line)
            base = self.operand(function, scope, match[1], statement, line)
            offset = match[2] or match[3]
            return Address(base, number(offset.replace(" ", "")) if offset else 0)
        if text.startswith("!"):
            return Negated(self.operand(function, scope, text[1:].strip(), statement, line))
        if text == "_":
            return Sink()
        if "|" in text:
            first, second = (part.strip() for part in text.split("|", 1))
            return Pair(
                self.operand(function, scope, first, statement, line),
                self.operand(function, scope, second, statement, line),
            )
        if _NUMBER.fullmatch(text):
            return Immediate(text)
        if text == "WARP_SZ":
            return Immediate("32")
        found = scope.find(text)
        if isinstance(found, Register):
            self.use(function, found)
            return found
        if found is not None:
            return Symbol(found.name)
        if _SPECIAL.fullmatch(text):
            return Special(text)
        if match := re.fullmatch(r"([A-Za-z_$][\w$]*)\s*(?:\+\s*(\d+))?", text):
            return Symbol(match[1], int(match[2] or 0))
        return self.refuse(f"an unknown operand, {text}", statement, line)

    # Variables.

    def declaration(self, statement, line):
        head, equals, initial = statement.partition("=")
        variables = [self.one_declaration(part.strip(), line) for part in [head]]
        if equals:
            variables[0].data = self.initial(variables[0], initial.strip(), statement, line)
            if variables[0].length is None:
                variables[0].length = len(variables[0].data)
        return variables

    def one_declaration(self, text, line):
        match = re.fullmatch(
            r"(?:\.(?:visible|weak|extern|common)\s+)*"
            r"\.(param|shared|local|global|const)\s*"
            r"(?:\.attribute\([^)]*\)\s*)?"
            r"(?:\.align\s+(\d+)\s+)?(?:\.v([24])\s+)?\.(\w+)\s+"
            r"(?:\.ptr\s+)?(?:\.(?:global|shared|local|const)\s+)?(?:\.align\s+\d+\s+)?"
            r"([\w$%]+)((?:\[\d*\])*)\s*",
            text,
        )
        if not match or match[4] not in SIZES:
            self.refuse("an unknown declaration", text, line)
        space, alignment, vector, type_, name, dimensions = match.groups()
        size = SIZES[type_] * int(vector or 1)
        length = size
        for dimension in re.findall(r"\[(\d*)\]", dimensions):
            length = None if dimension == "" or length is None else length * int(dimension)
        return Variable(name, space, type_, int(alignment or size), length, line)

    def initial(self, variable, text, statement, line):
        size, data = SIZES[variable.type], bytearray()
        for part in text.replace("{", "").replace("}", "").split(","):
            part = part.strip()
            if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", part):
                data += int(part[2:], 16).to_bytes(size, "little")
            elif re.fullmatch(r"[-+]?\d\w*", part):
                data += (number(part) % (1 << 8 * size)).to_bytes(size, "little")
            else:
                self.refuse("an unknown initial value", statement[:80], line)
        return bytes(data)


def _split(text):
    """The parts between the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []
