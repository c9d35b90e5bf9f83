"""Attention beside SDPA on random shapes: which are slower?

    python benchmarks/sweep_attention.py [--shapes 200] [--first 0] [--seconds 0.2] [--out FILE]

Shapes, dtypes, masks and passes are drawn from a fixed seed; `--first` and `--shapes` choose a
stretch of them, so that a sweep can be run in pieces. Both implementations take turns. What is
slower than SDPA by more than 10 % is timed three times more, and counts as slower by the median of
these; the exit status is 1 where anything does.
"""

import argparse
import json
import math
import random
import statistics
import sys

import torch

from genkern.bench.machine import describe, machine_is_busy
from genkern.bench.measure import interleave
from genkern.bench.workloads import attention

SEED = 7
SLOWER = 1 / 1.1
# What eager's matrix of scores would have: no shape takes longer than a second or so.
MOST_PAIRS = 1 << 23


def draw(source):
    """One random workload."""
    while True:
        N = round(2 ** source.uniform(4, 12))
        B, H = source.choice((1, 1, 2, 4, 8)), source.choice((1, 1, 2, 4, 8, 16))
        is_causal = source.random() < 0.4
        M = N if is_causal or source.random() < 0.6 else round(2 ** source.uniform(4, 12))
        d = source.choice((16, 24, 32, 40, 64, 64, 80, 96, 128))
        dv = d if source.random() < 0.85 else source.choice((16, 32, 64, 96, 128))
        dtype = source.choice((torch.float32, torch.bfloat16))
        derivative = source.choice(("none", "backward"))
        if B * H * N * M * (d + dv) / 128 <= MOST_PAIRS:
            shape = {"M": M, "dv": dv, "is_causal": is_causal, "dtype": dtype}
            return attention(B, H, N, d, **shape, derivative=derivative)


def speed(workload, seconds):
    """SDPA's median time over ours."""
    steps = {name: workload.prepare(name) for name in ("sdpa", "genkern")}
    for step in steps.values():
        step()
    times = interleave(steps, seconds)
    return statistics.median(times["sdpa"]) / statistics.median(times["genkern"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.2, help="of timing a shape")
    parser.add_argument("--out", help="a JSON file for the numbers")
    arguments = parser.parse_args()
    source = random.Random(SEED)
    workloads = [draw(source) for _ in range(arguments.first + arguments.shapes)]
    print(describe())
    rows = []
    for workload in workloads[arguments.first :]:
        ratio, again = speed(workload, arguments.seconds), []
        if ratio < SLOWER:
            again = [speed(workload, arguments.seconds) for _ in range(3)]
        rows.append({"name": workload.name, "ratio": ratio, "again": again})
        rows[-1]["busy"] = bool(again) and machine_is_busy()
        if again:
            retimed = ", ".join(f"{x:.2f}" for x in again)
            print(f"{workload.name}: {ratio:.2f}x SDPA's speed, again {retimed}", flush=True)
    final = [statistics.median(row["again"] or [row["ratio"]]) for row in rows]
    slower = sum(ratio < SLOWER for ratio in final)
    mean = math.exp(statistics.fmean(math.log(ratio) for ratio in final))
    print(
        f"{len(rows)} shapes, {slower} slower than SDPA by more than 10 %; {mean:.2f}x on average"
    )
    print(f"slowest {min(final):.2f}x, quartiles", *(f"{q:.2f}" for q in quartiles(final)))
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(rows, file, indent=1)
    return 1 if slower else 0


def quartiles(numbers):
    return statistics.quantiles(numbers, n=4) if len(numbers) > 1 else numbers * 3


if __name__ == "__main__":
    sys.exit(main())
