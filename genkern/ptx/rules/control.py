"""Jumps, calls, exits, barriers and what a thread can ask of the machine."""

from genkern.ptx.errors import UnsupportedPTX
from genkern.ptx.program import Immediate, Symbol
from genkern.ptx.rules.table import Rule


def _operands(instruction, *counts):
    if len(instruction.operands) not in counts:
        raise UnsupportedPTX(f"{' or '.join(map(str, counts))} operands expected")
    return instruction.operands


def _branch(translator, instruction, words):
    (target,) = _operands(instruction, 1)
    return translator.jump(target, instruction)


def _branch_table(translator, instruction, words):
    index, table = _operands(instruction, 2)
    if not isinstance(table, Symbol) or table.name not in translator.function.targets:
        raise UnsupportedPTX("a table of .branchtargets expected")
    text = f"switch ({translator.source(index, 'u32')}) {{ "
    for i, name in enumerate(translator.function.targets[table.name]):
        text += f"case {i}: {translator.jump(Symbol(name), instruction)} "
    return text + (
        f"default: fail(t, {instruction.line}, Fault::trap, "
        '"an index outside the table of targets"); }'
    )


def _call(translator, instruction, words):
    return translator.call(instruction)


def _return(translator, instruction, words):
    _operands(instruction, 0)
    return translator.leave()


def _exit(translator, instruction, words):
    _operands(instruction, 0)
    return "exit_thread(t);" if not translator.function.is_entry else translator.leave()


def _trap(translator, instruction, words):
    return f'fail(t, {instruction.line}, Fault::trap, "the kernel executed trap");'


def _count(translator, operand):
    if isinstance(operand, Immediate) and (
        translator.constant(operand) % 32 or translator.constant(operand) == 0
    ):
        raise UnsupportedPTX("a barrier's count is a positive multiple of 32")
    return translator.source(operand, "u32")


def _aligned(words):
    # bar.x is barrier.x.aligned
    return "true" if words["op"] == "bar" or words["aligned"] != "none" else "false"


def _barrier(translator, instruction, words):
    operands = _operands(instruction, 1, 2)
    count = _count(translator, operands[1]) if len(operands) == 2 else "0"
    identity = translator.source(operands[0], "u32")
    return (
        f"barrier(t, {identity}, {count}, {_aligned(words)}, no_reduction, false, "
        f"{instruction.line});"
    )


def _arrive(translator, instruction, words):
    identity, count = _operands(instruction, 2)
    return (
        f"barrier_arrive(t, {translator.source(identity, 'u32')}, {_count(translator, count)}, "
        f"{_aligned(words)}, {instruction.line});"
    )


def _barrier_reduction(translator, instruction, words):
    operands = _operands(instruction, 3, 4)
    count = _count(translator, operands[2]) if len(operands) == 4 else "0"
    reduction = {"popc": "count_of", "and": "all_of", "or": "any_of"}[words["reduction"]]
    value = (
        f"barrier(t, {translator.source(operands[1], 'u32')}, {count}, {_aligned(words)}, "
        f"{reduction}, {translator.source(operands[-1], 'pred')}, {instruction.line})"
    )
    type_ = "u32" if words["reduction"] == "popc" else "pred"
    return translator.assign(operands[0], type_, value)


def _nothing(translator, instruction, words):
    return ";"


_ALIGNED = "(op=bar|barrier)(.cta)?"

RULES = [
    Rule("bra(.uni)?", "", _branch),
    Rule("brx.idx(.uni)?", "", _branch_table),
    Rule("call(.uni)?", "", _call),
    Rule("ret(.uni)?", "", _return),
    Rule("exit", "", _exit),
    Rule("trap", "", _trap),
    Rule(f"{_ALIGNED}.sync(aligned=.aligned)?", "", _barrier),
    Rule(f"{_ALIGNED}.arrive(aligned=.aligned)?", "", _arrive),
    Rule(f"{_ALIGNED}.red(reduction=.popc)(aligned=.aligned)?.u32", "", _barrier_reduction),
    Rule(f"{_ALIGNED}.red(reduction=.and|.or)(aligned=.aligned)?.pred", "", _barrier_reduction),
    Rule("nanosleep.u32", "", _nothing),
    Rule("griddepcontrol(.launch_dependents|.wait)", "", _nothing),
    Rule("setmaxnreg(.inc|.dec).sync.aligned.u32", "", _nothing),
]
