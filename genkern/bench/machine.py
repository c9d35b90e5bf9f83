"""What this machine can do at best, and whether it is quiet enough to say anything."""

import platform
import statistics
import time

import torch

from genkern.info import cpu_model


def describe():
    """One line: processor, threads, versions."""
    return (
        f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def median_seconds(call, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def parallel_region_microseconds():
    """The median cost of waking torch's threads for next to nothing."""
    x = torch.zeros(1 << 16)
    return median_seconds(lambda: x.add_(1), 200) * 1e6


def machine_is_busy():
    """Whether another job holds a core: threads then wait for each other, and times are noise."""
    return parallel_region_microseconds() > 50


def copy_gigabytes_per_second():
    """Copy bandwidth: bytes read plus bytes written, into a buffer already touched, 256 MB."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source).copy_(source)
    seconds = median_seconds(lambda: target.copy_(source), 7)
    return 2 * source.numel() * 4 / seconds / 1e9


def gemm_gigaflops(dtype):
    """Matrix product of 2048³ by torch, in GF/s."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    out = a @ b
    seconds = median_seconds(lambda: torch.mm(a, b, out=out), 5)
    return 2 * 2048**3 / seconds / 1e9


def ceilings():
    """The machine's measured ceilings, by name."""
    return {
        "copy bandwidth, GB/s": round(copy_gigabytes_per_second(), 1),
        "GEMM fp32, GF/s": round(gemm_gigaflops(torch.float32)),
        "GEMM bf16, GF/s": round(gemm_gigaflops(torch.bfloat16)),
        "waking 2 threads, µs": round(parallel_region_microseconds(), 1),
    }
