"""Lower bounds on time: what a board needs at its public peaks for the least bytes and the least
operations of a call. No prediction: a kernel may take many times as long."""

from genkern.static.hardware import BOARDS


def bounds(call, least):
    """{target: (seconds, what bounds it)}; `least`: the least bytes. None of the operations can be
    done where a board has nothing to do them with."""
    found = {}
    for target, board in BOARDS.items():
        by_memory = least / board.memory
        by_operations = call.operations / getattr(board, call.unit)
        found[target] = max((by_memory, "memory"), (by_operations, call.unit))
    return found
