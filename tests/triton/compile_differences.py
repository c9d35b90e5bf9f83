"""Compiles the kernels of mean differences for the targets in the first argument; with
"exhaustive" as the second, all of them."""

import sys

import torch

from genkern.assembly import report
from genkern.ops.differences import op


def call(distance, dtype, pairs, count):
    def run():
        a, b = (
            [torch.zeros(count, dtype=dtype, requires_grad=True) for _ in range(pairs)]
            for _ in range(2)
        )
        op.differences([("a", "b")] * pairs, a, b, distance, [1.0] * pairs).backward()

    return run


def cases(exhaustive):
    for distance in ("absolute", "square") if exhaustive else ("absolute",):
        for dtype in (
            (torch.bfloat16, torch.float32, torch.float64) if exhaustive else (torch.bfloat16,)
        ):
            for pairs in (1, 54) if exhaustive else (54,):
                for count in (4096, 4099) if exhaustive else (4096,):
                    name = f"{distance} {dtype} {pairs} {count}"
                    yield name, call(distance, dtype, pairs, count)


report(dict(cases("exhaustive" in sys.argv[2:])), sys.argv[1].split(","))
