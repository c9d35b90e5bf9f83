"""Compiles spectral normalization's Triton kernels ahead of time: see conftest.py's `assemblies`.

python compile_spectral_norm.py sm_80,gfx942 float32,bfloat16 [misaligned]
"""

import sys

import torch

from genkern.assembly import report
from genkern.ops.spectral_norm import op

SHAPES = [((128, 64, 3, 3), 0), ((64, 32, 4, 4), 1), ((1, 1000), 0), ((40, 30), 1)]


def call(dtype, offset, order):
    """Two iterations and none, forward and backward: every kernel in every variant."""
    weights, us, vs, dims = [], [], [], []
    for shape, dim in SHAPES:
        weight = torch.ones(torch.Size(shape).numel() + offset, dtype=dtype)[offset:].view(shape)
        weights.append(weight.requires_grad_())
        us.append(torch.ones(shape[dim], dtype=dtype))
        vs.append(torch.ones(weight.numel() // shape[dim], dtype=dtype))
        dims.append(dim)
    iterations = [2, 0, 1, 1]
    result = op.spectral_norm(
        weights, us, vs, dims, n_power_iterations=iterations, order=order, update=True
    )
    outputs = [*result.weights, result.sigma]
    torch.autograd.grad(outputs, weights, [torch.ones_like(x) for x in outputs])


if __name__ == "__main__":
    targets, dtypes = sys.argv[1].split(","), sys.argv[2].split(",")
    offset = 1 if sys.argv[3:] == ["misaligned"] else 0
    cases = {
        f"{dtype} {order}": lambda dtype=dtype, order=order: call(
            getattr(torch, dtype), offset, order
        )
        for dtype in dtypes
        for order in ("u_first",)
    }
    report(cases, targets)
