"""The table of instructions: a pattern of whole opcodes, the operands, and the C++ they become.

A pattern is an opcode with alternatives: `add(round=.rn|.rz)?(ftz=.ftz)?.f32`. A named alternative
is handed to the C++ by its name, without its dots, or as `none` where the instruction doesn't say;
dots are literal. Only a full match counts, so a modifier that no rule names is refused.

Operands: `d:s32 a:s32 b:u32` names and types them in order. `d` alone is written; a type may be a
named alternative, `a:{type}`. The C++ is an expression for d, or, where there is a function
instead, what that function makes of the instruction (its rule then has no operands).
"""

import re
from typing import NamedTuple


class Rule(NamedTuple):
    pattern: str
    operands: str
    cpp: object  # text, or a function (translator, instruction, words) -> statements


class Table:
    """Rules by the first word of their opcodes."""

    def __init__(self, rules):
        self.rules = list(rules)
        self._by_word, self._found = {}, {}
        for rule in self.rules:
            compiled = re.compile(_regular_expression(rule.pattern))
            for word in _first_words(rule.pattern):
                self._by_word.setdefault(word, []).append((compiled, rule))

    def find(self, opcode, operands):
        """The rule of an opcode with so many operands, and its named alternatives; or None."""
        key = opcode, operands
        if key not in self._found:
            self._found[key] = self._search(opcode, operands)
        return self._found[key]

    def _search(self, opcode, operands):
        for compiled, rule in self._by_word.get(opcode.split(".")[0], ()):
            if rule.operands and len(rule.operands.split()) != operands:
                continue
            if match := compiled.fullmatch(opcode):
                words = {name: _word(text) for name, text in match.groupdict().items()}
                return rule, words
        return None

    def used(self):
        """The rules that have been found so far: what a program, or a test, has tried."""
        return [found[0] for found in self._found.values() if found]

    def with_rule(self, old, new):
        """Another table, with one rule in place of another: how a test mutates a rule."""
        return Table([new if rule is old else rule for rule in self.rules])


def _first_words(pattern):
    """`add` of add.u32, or all of (op=add|addc)."""
    match = re.match(r"\(\w+=([\w|]+)\)|(\w+)", pattern)
    return (match[1] or match[2]).split("|")


def _regular_expression(pattern):
    pattern = pattern.replace(".", r"\.")
    pattern = re.sub(r"\((\w+)=", r"(?P<\1>", pattern)
    return re.sub(r"\((?!\?)", "(?:", pattern)


def _word(text):
    if not text:
        return "none"
    word = text.lstrip(".").replace("::", "_").replace(".", "_")
    return "abs_" if word == "abs" else word
