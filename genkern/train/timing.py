"""Timing of whole training steps: which number of threads is fastest, and eager against genkern.

Both time throwaway trainers, interleaved in one process, so that another job on the machine slows
all candidates alike."""

import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import genkern


def calibrate_threads(make_step: Callable, rounds: int = 5) -> dict[int, float]:
    """Median seconds of a step for 1, 2, 4, … threads and all cores. `make_step()` returns a
    function that makes one step of a fresh trainer. Leaves the number of threads as it was; the
    random state is not touched."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    candidates = sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})
    if len(candidates) == 1:
        return {1: 0.0}
    before = torch.get_num_threads()
    seconds = {threads: [] for threads in candidates}
    with torch.random.fork_rng():
        step = make_step()
        for turn in range(rounds + 1):
            for threads in candidates:
                torch.set_num_threads(threads)
                elapsed = _timed(step)
                if turn > 0:
                    seconds[threads].append(elapsed)
    torch.set_num_threads(before)
    return {threads: statistics.median(times) for threads, times in seconds.items()}


def fastest(medians: dict[int, float]) -> int:
    """The fewest threads within 10 % of the best time: fewer are steadier on a shared machine, and
    two runs choose the same more often."""
    best = min(medians.values())
    return min(threads for threads, seconds in medians.items() if seconds <= 1.1 * best)


class Comparison(NamedTuple):
    """Median seconds of a training step."""

    eager: float
    genkern: float
    steps: int

    def __str__(self):
        ratio = self.eager / self.genkern
        verdict = f"{ratio:.2f}x" if ratio >= 1 else f"{ratio:.2f}x, genkern is slower here"
        return (
            f"step time: eager {1e3 * self.eager:.1f} ms, genkern {1e3 * self.genkern:.1f} ms "
            f"({verdict}; medians of {self.steps} interleaved steps, "
            f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''})"
        )


def compare_backends(make_step: Callable, fused: str, steps: int = 20) -> Comparison:
    """The same step on the reference backend (eager PyTorch) and on the `fused` one ("cpu" or
    "cuda")."""
    eager_times, fused_times = [], []
    with torch.random.fork_rng():
        eager_step, fused_step = make_step(), make_step()
        for turn in range(steps + 2):
            with genkern.use_backend("reference"):
                eager_seconds = _timed(eager_step)
            with genkern.use_backend(fused):
                fused_seconds = _timed(fused_step)
            if turn >= 2:
                eager_times.append(eager_seconds)
                fused_times.append(fused_seconds)
    return Comparison(statistics.median(eager_times), statistics.median(fused_times), steps)


def _timed(step):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
