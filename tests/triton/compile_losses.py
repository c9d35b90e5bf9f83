"""Compiles the kernels of adversarial losses for the targets in the first argument; with
"exhaustive" as the second, all of them."""

import sys

import torch

from genkern import losses
from genkern.assembly import report

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def call(loss, dtype, discriminators, count):
    def run():
        real, fake = (
            [torch.zeros(count, dtype=dtype, requires_grad=True) for _ in range(discriminators)]
            for _ in range(2)
        )
        value, _ = loss.d(real, fake, stats=True)
        value.backward()

    return run


def cases(exhaustive):
    some = losses.nonsaturating, losses.rpgan, losses.ragan
    for loss in (*some, losses.hinge, losses.rals) if exhaustive else some:
        for dtype in DTYPES if exhaustive else DTYPES[:: 2 if loss is losses.ragan else 3]:
            for discriminators in (1, 5, 64) if exhaustive else (5,):
                for count in (4096, 4099) if exhaustive else (4096,):
                    yield (
                        f"{loss.name} {dtype} {discriminators} {count}",
                        call(loss, dtype, discriminators, count),
                    )


report(dict(cases("exhaustive" in sys.argv[2:])), sys.argv[1].split(","))
