"""Compiles the kernels of norms of samples for the targets in the first argument; with
"exhaustive" as the second, all of them."""

import sys

import torch

from genkern.assembly import report
from genkern.ops.sample_norms import op


def call(function, dtype, items, size):
    def run():
        group = [torch.zeros(8, size, dtype=dtype, requires_grad=True) for _ in range(items)]
        op.sample_norms([group], function, 1.0, 2.0).sum().backward()

    return run


def cases(exhaustive):
    functions = ("squares", "square", "distance", "excess", "largest")
    for function in functions if exhaustive else ("distance", "largest"):
        for dtype in (torch.bfloat16, torch.float32, torch.float64)[: 3 if exhaustive else 1]:
            for items in (1, 5) if exhaustive else (1,):
                for size in (12288, 65, 1_000_001) if exhaustive else (12288,):
                    name = f"{function} {dtype} {items} {size}"
                    yield name, call(function, dtype, items, size)


report(dict(cases("exhaustive" in sys.argv[2:])), sys.argv[1].split(","))
