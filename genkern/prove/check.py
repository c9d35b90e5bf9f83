"""One workload executed, and compared with fp64."""

import contextlib
import time
from typing import NamedTuple

import torch

from genkern import ptx
from genkern.backend import explain, use_backend
from genkern.bench.workload import largest_error


class Outcome(NamedTuple):
    """What a workload came to on one backend. allowed: the error rule's bound on `error`. kernels:
    the names of those that were launched. fault: what the executor refused; elsewhere: the choice
    of another backend, which proves nothing; or None."""

    error: float
    allowed: float
    kernels: tuple
    seconds: float
    fault: str | None
    elsewhere: str | None

    @property
    def holds(self):
        return self.fault is None and self.elsewhere is None and self.error <= self.allowed


def execute(workload, backend, schedule):
    """Runs our step of the workload in the executor; everything else of it in eager PyTorch."""
    start = time.perf_counter()
    exact = workload.prepare("exact")()
    allowed = workload.allowed_error(largest_error(workload.prepare("eager")(), exact))
    step = workload.prepare("genkern")
    error, fault, elsewhere, launches = float("nan"), None, None, []
    try:
        with (
            _unwritten_memory_is_nan(),
            ptx.executing(schedule) as launches,
            use_backend(backend),
            explain() as log,
        ):
            got = step()
        error = largest_error(got, exact)
        elsewhere = next((str(choice) for choice in log if choice.backend != backend), None)
    except (ptx.ExecutionError, ptx.UnsupportedPTX) as found:
        fault = f"{type(found).__name__}: {found}"
    kernels = tuple(launch.kernel for launch in launches)
    return Outcome(error, allowed, kernels, time.perf_counter() - start, fault, elsewhere)


def execute_numbered(everything, number, backend, schedule):
    """The same for another process, to which workloads can't be sent."""
    from genkern.prove import workloads

    chosen = workloads.everything() if everything else workloads.quick()
    return execute(chosen[number], backend, schedule)


@contextlib.contextmanager
def _unwritten_memory_is_nan():
    """torch.empty arrives filled, so that what a kernel leaves out is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills
