"""Compiles the kernels of KL divergences for the targets in the first argument; with "exhaustive"
as the second, all of them."""

import sys

import torch

from genkern.assembly import report
from genkern.ops.gaussian_kl import op


def call(reduction, dtype, others, count):
    def run():
        tensors = [torch.zeros(count, dtype=dtype, requires_grad=True) for _ in range(2 + others)]
        value = op.gaussian_kl(*tensors, *[None] * (2 - others), reduction)
        value.sum().backward()

    return run


def cases(exhaustive):
    for reduction in ("mean", "none") if exhaustive else ("mean",):
        for dtype in (torch.bfloat16, torch.float32, torch.float64)[: 3 if exhaustive else 1]:
            for others in (2, 0) if exhaustive else (2,):
                for count in (4096, 4099) if exhaustive else (4096,):
                    name = f"{reduction} {dtype} {others} {count}"
                    yield name, call(reduction, dtype, others, count)


report(dict(cases("exhaustive" in sys.argv[2:])), sys.argv[1].split(","))
