"""Compiles spectral normalization's Triton kernels ahead of time: see conftest.py's `assemblies`.

python compile_spectral_norm.py sm_80,gfx942 float32,bfloat16 [all]
"""

import sys
from functools import partial

import torch

from genkern.assembly import report
from genkern.ops.spectral_norm import op

SHAPES = [((128, 64, 3, 3), 0), ((64, 32, 4, 4), 1), ((1, 1000), 0), ((40, 30), 1)]


def call(dtype, iterations, offset):
    """Forward and backward; weights `offset` elements into their memory. The kernels of a second
    iteration are others than the first one's."""
    weights, us, vs, dims = [], [], [], []
    for shape, dim in SHAPES:
        weight = torch.ones(torch.Size(shape).numel() + offset, dtype=dtype)[offset:].view(shape)
        weights.append(weight.requires_grad_())
        us.append(torch.ones(shape[dim], dtype=dtype))
        vs.append(torch.ones(weight.numel() // shape[dim], dtype=dtype))
        dims.append(dim)
    result = op.spectral_norm(weights, us, vs, dims, n_power_iterations=iterations, update=True)
    outputs = [*result.weights, result.sigma]
    torch.autograd.grad(outputs, weights, [torch.ones_like(x) for x in outputs])


if __name__ == "__main__":
    targets, dtypes = sys.argv[1].split(","), sys.argv[2].split(",")
    variants = [(1, 0), (2, 1)] if sys.argv[3:] == ["all"] else [(1, 0)]
    cases = {
        f"{dtype}, {iterations} iterations, {offset} elements in": partial(
            call, getattr(torch, dtype), iterations, offset
        )
        for dtype in dtypes
        for iterations, offset in variants
    }
    report(cases, targets)
