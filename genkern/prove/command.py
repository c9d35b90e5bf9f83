"""`genkern prove`: the table."""

import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

BACKENDS = ("cuda", "triton")


def add_prove_parser(commands):
    parser = commands.add_parser(
        "prove",
        help="execute the GPU kernels on this CPU, checked for races and against fp64",
    )
    parser.add_argument("--all", action="store_true", help="the whole grid, which takes long")
    parser.add_argument("--backend", choices=BACKENDS, help="only this one's kernels")
    parser.add_argument(
        "--jobs", type=int, default=min(4, os.cpu_count() or 1), help="so many processes at once"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.set_defaults(func=run)


def run(args):
    from genkern.prove import workloads

    start = time.perf_counter()
    backends = []
    for backend in BACKENDS if args.backend is None else (args.backend,):
        missing = what_is_missing(backend)
        if missing:
            print(f"{backend}: not executed: {missing}\n")
        else:
            backends.append(backend)
    if not backends:
        return 1
    print(HEADER)
    chosen = workloads.everything() if args.all else workloads.quick()
    failed, launched, rows = [], {backend: [] for backend in backends}, []
    for backend, workload, outcome in _outcomes(backends, chosen, args.all, args.jobs):
        rows.append(_facts(backend, workload, outcome))
        launched[backend] += outcome.kernels
        print(row(backend, workload, outcome))
        sys.stdout.flush()
        if not outcome.holds:
            failed.append(workload)
    print(EXPLANATION)
    for backend in backends:
        print(f"\n{summary(backend, launched[backend])}")
    if "cuda" in backends and not notices_a_missing_barrier(chosen):
        failed.append(None)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    print(f"\n{time.perf_counter() - start:.0f} s. {_verdict(failed)}")
    return 1 if failed else 0


def _outcomes(backends, chosen, everything, jobs):
    """(backend, workload, outcome), in order. Each backend has orders of threads of its own."""
    from genkern.prove.check import execute, execute_numbered

    wanted = [
        (backend, schedule, number)
        for schedule, backend in enumerate(backends)
        for number in range(len(chosen))
    ]
    if jobs == 1:
        for backend, schedule, number in wanted:
            yield backend, chosen[number], execute(chosen[number], backend, schedule)
        return
    # Most of the time is the C++ compiler's, on one core.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [
            pool.submit(execute_numbered, everything, number, backend, schedule)
            for backend, schedule, number in wanted
        ]
        try:
            for (backend, _, number), job in zip(wanted, pending, strict=True):
                yield backend, chosen[number], job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _facts(backend, workload, outcome):
    """A row as plain values."""
    row = {"backend": backend, "op": workload.op, "shape": workload.shape}
    row["dtype"] = str(workload.dtype).removeprefix("torch.")
    return {**row, **outcome._asdict(), "holds": outcome.holds}


def what_is_missing(backend):
    """Why a backend's kernels can't be executed here, in a sentence; None where they can."""
    from genkern import ptx
    from genkern.backend import has_cuda
    from genkern.ops import _triton
    from genkern.ptx.build import compiler

    try:
        compiler()
    except ptx.CompilerMissing as error:
        return str(error)
    if backend == "cuda" and not has_cuda():
        return (
            "the CUDA kernels were not built (`genkern info` says why): "
            "GENKERN_CUDA=1 pip install '.[nvcc]' brings an nvcc from PyPI"
        )
    if backend == "triton":
        if _triton.is_interpreting():
            return (
                "TRITON_INTERPRET=1 is set, under which Triton compiles nothing: take it out of "
                "the environment"
            )
        return _triton.problem()
    return None


def notices_a_missing_barrier(chosen):
    import torch

    from genkern.prove.barrier import remove_one

    # The kernels in fp32 are compiled soonest.
    removed = remove_one(next(w for w in chosen if w.dtype == torch.float32))
    print(f"\nWithout the barrier in line {removed.line} of {readable(removed.kernel)}'s PTX:")
    print(f"  caught ✓  {removed.said}" if removed.said else "  ✗ nothing was noticed")
    return removed.said is not None


# ---- Text ---------------------------------------------------------------------------------------

HEADER = (
    f"{'backend':8}{'op':24}{'dtype':10}{'shape':34}{'error':>9}{'allowed':>10}{'launches':>10}"
    f"{'exact':>7}{'races':>7}{'seconds':>9}"
)
EXPLANATION = (
    "\nerror: of outputs and gradients against fp64, relative to each one's largest value. "
    "allowed: 1.25 times\neager PyTorch's error in the same dtype (2 times for second order and "
    "jvp) above rounding. races ✓: no\naccess out of bounds, unaligned, of memory that nothing "
    "wrote or of other threads' without a barrier or\nan atomic between, in shuffled orders of "
    "threads and blocks. Executed on the CPU; nothing ran on a GPU."
)


def row(backend, workload, outcome):
    dtype = str(workload.dtype).removeprefix("torch.")
    exact = "-" if outcome.fault else "✓" if outcome.error <= outcome.allowed else "✗"
    races = "✗" if outcome.fault else "✓" if outcome.kernels else "-"
    text = (
        f"{backend:8}{workload.op:24}{dtype:10}{workload.shape:34}{outcome.error:9.1e}"
        f"{outcome.allowed:10.1e}{len(outcome.kernels):10}{exact:>7}{races:>7}"
        f"{outcome.seconds:9.1f}"
    )
    if outcome.fault:
        text += f"\n        {outcome.fault}"
    if outcome.elsewhere:
        text += f"\n        ✗ not on {backend}: {outcome.elsewhere}"
    return text


def summary(backend, launched):
    """How many kernels were executed, and of CUDA how many were shipped."""
    from genkern.ptx import shipped

    count = len(set(launched))
    if backend == "triton":
        return f"triton: {len(launched)} launches of {count} kernels, compiled for sm_80"
    return (
        f"cuda: {len(launched)} launches of {count} of the {len(shipped.kernels())} kernels "
        f"(by dtype and size) whose sm_80 PTX was shipped"
    )


def readable(kernel):
    """A mangled name's own words."""
    import shutil
    import subprocess

    tool = shutil.which("c++filt")
    if tool is None:
        return kernel
    name = subprocess.run([tool, kernel], capture_output=True, text=True).stdout.strip()
    return name.removeprefix("void ").partition("(")[0].replace("genkern::cuda::", "")


def _verdict(failed):
    if not failed:
        return "Everything agrees with fp64, and no race was found."
    return f"{len(failed)} of these failed."
