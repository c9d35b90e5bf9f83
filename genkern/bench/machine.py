"""What this machine can do at best, and whether it is quiet enough to say anything."""

import platform
import statistics
import time

import torch

from genkern.info import cpu_model


def describe(device="cpu"):
    """One line: processor, threads, versions."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {versions}"
    return f"{cpu_model()}, {torch.get_num_threads()} threads, {versions}"


def wait(device):
    """Until the device has done what it was given; the CPU has when a call returns."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def median_seconds(call, repeats, device="cpu"):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def parallel_region_microseconds():
    """The median cost of waking torch's threads for next to nothing."""
    x = torch.zeros(1 << 16)
    return median_seconds(lambda: x.add_(1), 200) * 1e6


def machine_is_busy():
    """Whether another job holds a core: threads then wait for each other, and times are noise."""
    return parallel_region_microseconds() > 50


def copy_gigabytes_per_second(device="cpu"):
    """Copy bandwidth: bytes read plus bytes written, into a buffer already touched, 256 MB."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source).copy_(source)
    wait(device)
    seconds = median_seconds(lambda: target.copy_(source), 7, device)
    return 2 * source.numel() * 4 / seconds / 1e9


def gemm_gigaflops(dtype, device="cpu"):
    """Matrix product of 2048³ (on a GPU 8192³) by torch, in GF/s."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = a @ b
    wait(device)
    seconds = median_seconds(lambda: torch.mm(a, b, out=out), 5, device)
    return 2 * n**3 / seconds / 1e9


def ceilings(device="cpu"):
    """The measured ceilings of the machine, or of its GPU, by name."""
    found = {
        "copy bandwidth, GB/s": round(copy_gigabytes_per_second(device), 1),
        "GEMM fp32, GF/s": round(gemm_gigaflops(torch.float32, device)),
        "GEMM bf16, GF/s": round(gemm_gigaflops(torch.bfloat16, device)),
    }
    if device == "cpu":
        found["waking 2 threads, µs"] = round(parallel_region_microseconds(), 1)
    return found
