"""Measuring one workload: correctness, interleaved times, peak memory in fresh processes."""

import ctypes
import gc
import multiprocessing
import statistics
import time
from dataclasses import dataclass, field

import torch

from genkern.bench.machine import machine_is_busy, wait
from genkern.bench.workload import largest_error
from genkern.bench.workloads import all_workloads


@dataclass
class Result:
    """One workload's row; times in seconds, memory in bytes, both by implementation."""

    name: str
    median: dict = field(default_factory=dict)
    quartiles: dict = field(default_factory=dict)
    peak_memory: dict = field(default_factory=dict)
    error: float = float("nan")
    eager_error: float = float("nan")
    exact_enough: bool = False
    left_out: dict = field(default_factory=dict)  # implementation: why
    busy: bool = False  # another job held a core before or after the timing


def measure(workload, *, seconds, compile_too, device="cpu"):
    """Measures one workload for about `seconds` of timing; returns a Result."""
    result = Result(workload.name)
    steps = {}
    for name in workload.implementations:
        if name == "floor" and device != "cpu":
            continue  # it is one of loops of the CPU
        if name == "compile" and not compile_too:
            result.left_out[name] = "with --quick: it takes long to compile"
            continue
        try:
            steps[name] = workload.prepare(name, device)
            steps[name]()
            if name == "compile":
                steps[name]()
        except Exception as error:  # torch.compile fails in many ways, and the table says so
            if name == "genkern":
                raise
            steps.pop(name, None)
            result.left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    check(workload, result, device)
    result.busy = device == "cpu" and machine_is_busy()
    times = interleave(steps, seconds, device=device)
    result.busy = result.busy or (device == "cpu" and machine_is_busy())
    for name, values in times.items():
        result.median[name] = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4)
        result.quartiles[name] = (low, high)
    for name in ("eager", "genkern"):
        of_device = peak_memory if device == "cpu" else peak_device_memory
        result.peak_memory[name] = of_device(workload, name)
    return result


def check(workload, result, device="cpu"):
    """Outputs and gradients of ours and of eager against eager in fp64, each relative to the
    largest exact value of its tensor."""
    exact = workload.prepare("exact", device)()
    result.error, result.eager_error = (
        largest_error(workload.prepare(name, device)(), exact) for name in ("genkern", "eager")
    )
    result.exact_enough = result.error <= workload.allowed_error(result.eager_error)


def interleave(steps, seconds, least=7, most=2000, device="cpu"):
    """Times of every step, one after the other in rounds, so that all meet the same noise."""
    times = {name: [] for name in steps}
    if device != "cpu":
        steps = {name: _timed_on_gpu(step) for name, step in steps.items()}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < most and (rounds < least or time.perf_counter() < end):
        for name, step in steps.items():
            times[name].append(_seconds(step) if device == "cpu" else step())
        rounds += 1
    return times


def _seconds(step):
    start = time.perf_counter()
    results = step()
    seconds = time.perf_counter() - start
    # After the clock: whoever frees the last piece of the heap has the C library give back what
    # others left there, milliseconds that are not this step's.
    del results
    return seconds


def _timed_on_gpu(step, seconds=2e-3):
    """A function that returns the time of one of as many steps in a row as fill `seconds`, by
    events: as in training, the GPU waits for Python only where Python is the slower of the two."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(repeats):
        begin.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats

    run(2)
    repeats = max(1, min(200, round(seconds / run(3))))
    return lambda: run(repeats)


def peak_memory(workload, implementation):
    """The growth of peak resident memory in one step of a fresh process, inputs not counted and
    code already loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["genkern.bench.measure"])
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, workload.name, implementation, torch.get_num_threads())
    child = context.Process(target=_measure_peak, args=arguments)
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise OSError(f"the process that measures the memory of {workload.name} died") from None
    finally:
        child.join()


def peak_device_memory(workload, implementation):
    """The growth of torch's memory on the GPU in one step, of which there was one before."""
    step = workload.prepare(implementation, "cuda")
    step()
    wait("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    wait("cuda")
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def _measure_peak(sender, workload_name, implementation, threads):
    torch.set_num_threads(threads)
    workload = next(w for w in all_workloads() if w.name == workload_name)
    # Another one first touches the code, whose pages are no memory of the step's own; what the step
    # keeps for the next one counts, so it must be the first of its own.
    workload.prepare(implementation)()
    gc.collect()
    step = workload.prepare(implementation)
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = _status("VmRSS")
    kept = step()
    sender.send(_status("VmHWM") - before)
    del kept


def _status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
