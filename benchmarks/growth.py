"""How attention's time grows with the length of a sequence, as a table and a plot.

    python benchmarks/growth.py [--dtype bfloat16] [--longest 16384] [--out JSON] [--plot SVG]

Forward, and forward and backward, of one head of 64 features (batch 1) at N = M = 64, 128, …; eager
as long as its matrix of scores stays below 64 MB. The plot needs matplotlib, the table does not.
`--from FILE` draws tables made before, without timing anything.
"""

import argparse
import json
import statistics

import torch

from genkern.bench.machine import describe, machine_is_busy
from genkern.bench.measure import interleave
from genkern.bench.workloads import attention

SHORTEST, FEATURES, MOST_OF_EAGER = 64, 64, 1 << 24
PASSES = {"none": "forward", "backward": "forward and backward"}


def measure(dtype, longest, seconds):
    """[{pass, dtype, N, implementation: seconds, …}]"""
    rows = []
    for derivative, title in PASSES.items():
        length = SHORTEST
        while length <= longest:
            workload = attention(1, 1, length, FEATURES, dtype=dtype, derivative=derivative)
            names = (
                ("genkern", "sdpa", "eager") if length**2 <= MOST_OF_EAGER else ("genkern", "sdpa")
            )
            steps = {name: workload.prepare(name) for name in names}
            for step in steps.values():
                step()
            times = interleave(steps, seconds, least=5)
            row = {"pass": title, "dtype": str(dtype).removeprefix("torch."), "N": length}
            row |= {name: statistics.median(values) for name, values in times.items()}
            rows.append(row | {"busy": machine_is_busy()})
            length *= 2
    return rows


def table(rows):
    """The rows as markdown, times in milliseconds."""
    lines = [
        "| pass | dtype | N | genkern | SDPA | eager | vs SDPA |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[n] * 1e3:.3f} ms" if n in row else "–" for n in ("genkern", "sdpa", "eager")
        ]
        ratio = f"{row['sdpa'] / row['genkern']:.2f}×"
        place = [row["pass"], row["dtype"], str(row["N"])]
        lines.append("| " + " | ".join([*place, *cells, ratio]) + " |")
    return "\n".join(lines)


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "genkern"
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    titles = list(dict.fromkeys(row["pass"] for row in rows))
    size = {"figsize": (5.2 * len(titles), 3.8 * len(dtypes)), "squeeze": False, "sharex": True}
    figure, axes = pyplot.subplots(len(dtypes), len(titles), **size)
    for dtype, line in zip(dtypes, axes, strict=True):
        for title, axis in zip(titles, line, strict=True):
            chosen = [row for row in rows if (row["dtype"], row["pass"]) == (dtype, title)]
            for name in ("genkern", "sdpa", "eager"):
                points = [(row["N"], row[name] * 1e3) for row in chosen if name in row]
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            axis.set(xscale="log", yscale="log", title=f"{title}, {dtype}")
            axis.set(xlabel="N", ylabel="ms")
            axis.set_xticks([row["N"] for row in chosen], [str(row["N"]) for row in chosen])
            axis.tick_params(axis="x", labelrotation=45)
            axis.grid(alpha=0.3)
            axis.legend()
    figure.suptitle("Attention, one head of 64 features, CPU")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing a length")
    parser.add_argument("--from", dest="made", nargs="*", default=[], help="JSON files made before")
    parser.add_argument("--out", help="a JSON file for the numbers")
    parser.add_argument("--table", help="a file for the table, else it is printed")
    parser.add_argument("--plot", help="an image file (matplotlib)")
    arguments = parser.parse_args()
    rows = []
    for path in arguments.made:
        with open(path) as file:
            rows += json.load(file)
    if not rows:
        print(describe())
        rows = measure(getattr(torch, arguments.dtype), arguments.longest, arguments.seconds)
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(rows, file, indent=1)
    if arguments.table:
        with open(arguments.table, "w") as file:
            file.write(table(rows) + "\n")
    else:
        print(table(rows))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
