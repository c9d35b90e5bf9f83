"""`genkern bench`: the table."""

import json
import sys
from dataclasses import asdict


def add_bench_parser(commands):
    parser = commands.add_parser(
        "bench",
        help="time and memory beside eager PyTorch, torch.compile and SDPA, on this machine",
    )
    parser.add_argument("op", nargs="?", help="only workloads whose name begins so, like attention")
    parser.add_argument("--quick", action="store_true", help="a selection, in under a minute")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.set_defaults(func=run)


def run(args):
    import torch

    from genkern.bench import machine
    from genkern.bench.measure import measure
    from genkern.bench.workloads import all_workloads

    if args.device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, not {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU on this machine")
    chosen = all_workloads(args.device)
    chosen = [w for w in chosen if not args.op or w.name.startswith(args.op)]
    chosen = [w for w in chosen if w.quick or not args.quick]
    if not chosen:
        raise ValueError(f"no workload's name begins with {args.op!r}")
    ceilings = machine.ceilings(args.device)
    print(machine.describe(args.device))
    print(", ".join(f"{name}: {value}" for name, value in ceilings.items()))
    print()
    print(HEADER)
    results = []
    for workload in chosen:
        result = measure(
            workload,
            seconds=1 if args.quick else 4,
            compile_too=not args.quick or workload.quick == "compiled",
            device=args.device,
        )
        results.append(result)
        print(row(workload, result))
        sys.stdout.flush()
    print(
        "\nForward and backward, where nothing else is said; medians, implementations interleaved. "
        "vs eager:\nhow many times faster than eager. memory: growth of peak RSS in a fresh "
        "process (on a GPU of torch's\nmemory there), eager → genkern. error: largest error of "
        "outputs and gradients against fp64, relative;\n✓ at most 1.25 times eager's (of second "
        "derivatives 2) or rounding."
    )
    if floors := [result for result in results if "floor" in result.median]:
        print(
            "\nTimes the floor, a plain loop with the same reads and writes into outputs allocated "
            "alike:",
            ", ".join(f"{r.name} {r.median['genkern'] / r.median['floor']:.2f}" for r in floors),
        )
    if busy := [result.name for result in results if result.busy]:
        print("The machine was busy meanwhile, so their times are noise:", "; ".join(busy))
    for result in results:
        for name, why in result.left_out.items():
            print(f"{result.name}: no {name} ({why})")
    if args.json:
        document = {
            "machine": machine.describe(args.device),
            "ceilings": ceilings,
            "results": [asdict(result) for result in results],
        }
        with open(args.json, "w") as file:
            json.dump(document, file, indent=2)
    return 0 if all(result.exact_enough for result in results) else 1


HEADER = (
    "| op | shape | dtype | eager | compile | SDPA | genkern | vs eager | memory | error |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def row(workload, result):
    """One line of the Markdown table."""
    median = result.median
    ratio = median["eager"] / median["genkern"]
    memory = result.peak_memory
    return (
        f"| {workload.op} | {workload.shape} | {str(workload.dtype).removeprefix('torch.')} "
        + "".join(f"| {_time(median.get(n))} " for n in ("eager", "compile", "sdpa", "genkern"))
        + f"| **{ratio:.2f}×** "
        + f"| {_bytes(memory['eager'])} → {_bytes(memory['genkern'])} "
        + f"| {result.error:.0e} {'✓' if result.exact_enough else '✗'} |"
    )


def _time(seconds):
    if seconds is None:
        return "–"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def _bytes(count):
    return f"{count / 1e6:.1f} MB"
