"""What can go wrong: at translation, and while a kernel runs."""


class UnsupportedPTX(Exception):
    """An instruction, modifier, type or operand that the executor has no rule for: line, text."""

    def __init__(self, message, line=None, text=""):
        where = f" (PTX line {line}: {text})" if line else ""
        super().__init__(message + where)
        self.line, self.text = line, text


class ExecutionError(Exception):
    """A kernel did what it must not: kernel, block, thread (x, y, z of each) and PTX line."""

    def __init__(self, message, kernel=None, block=None, thread=None, line=None, text=""):
        place = ""
        if kernel is not None:
            place = f"{kernel}, block {block}, thread {thread}, PTX line {line}"
            place += f" ({text}): " if text else ": "
        super().__init__(place + message)
        self.kernel, self.block, self.thread, self.line = kernel, block, thread, line


class OutOfBounds(ExecutionError):
    """An access outside every registered buffer, or outside shared or local memory."""


class ReadOnly(ExecutionError):
    """A write to a buffer that may only be read."""


class Misaligned(ExecutionError):
    """An address that is no multiple of the access's size."""


class Uninitialised(ExecutionError):
    """A read of shared or local memory that nothing has written, or that cp.async still writes."""


class Divergence(ExecutionError):
    """A barrier that not all threads reach, or that lanes of a warp reach in different places."""


class AbsentLane(ExecutionError):
    """A warp instruction that names a lane which has exited, does not exist or never comes."""


class Race(ExecutionError):
    """Two accesses to one byte, one of them a write, with nothing that orders them."""


class Deadlock(ExecutionError):
    """No thread can go on, or the kernel ran past its limit of instructions."""


class Trap(ExecutionError):
    """The kernel executed `trap`, or an instruction whose operands have no meaning."""


# In the order of `enum class Fault` in runtime/thread.h.
FAULTS = (
    OutOfBounds,
    ReadOnly,
    Misaligned,
    Uninitialised,
    Divergence,
    AbsentLane,
    Race,
    Deadlock,
    Trap,
)
