"""GENKERN_TRITON_AUTOTUNE=1: a kernel's configuration is the fastest of a few around the table's,
timed on the GPU when a kind of call is met first, and remembered for the process."""

import os

import torch

from genkern.ops import _triton

_fastest = {}


def is_wanted():
    return os.environ.get("GENKERN_TRITON_AUTOTUNE") == "1"


def is_possible(tensor):
    """Not in the interpreter, nor while launches are recorded or captured in a CUDA graph."""
    return (
        tensor.is_cuda and not _triton.is_taken() and not torch.cuda.is_current_stream_capturing()
    )


def around(configuration):
    """The configuration itself, then its neighbours: other stages, other warps, smaller tiles."""
    found = [configuration]
    stages, warps = configuration["num_stages"], configuration["num_warps"]
    found += [{**configuration, "num_stages": n} for n in (stages - 1, stages + 1) if n > 0]
    found += [{**configuration, "num_warps": 12 - warps}] if warps in (4, 8) else []
    for side in ("QUERIES", "KEYS"):
        if configuration[side] > 16:
            found.append({**configuration, side: configuration[side] // 2})
    return found


def fastest(key, configuration, run, milliseconds=None):
    """The configuration for calls of this key; `run(configuration)` launches one, any number of
    times with the same result. One that does not fit into the GPU is passed over."""
    if key not in _fastest:
        milliseconds = milliseconds or _milliseconds
        times = [milliseconds(run, candidate) for candidate in around(configuration)]
        _fastest[key] = around(configuration)[times.index(min(times))]
    return _fastest[key]


def _milliseconds(run, configuration):
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(lambda: run(configuration), warmup=5, rep=30)
    except OutOfResources:
        return float("inf")
