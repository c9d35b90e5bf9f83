"""Gradient penalties' own part, beside the discriminator's derivatives: from the gradient of the
input to the penalty and back."""

import math

import torch

from genkern.bench.workload import Workload, compiled, numbers
from genkern.ops.sample_norms.op import sample_norms

EAGER = {
    "square": lambda g: g.square().flatten(1).sum(1).mean(),  # R1, zero-centred
    "distance": lambda g: (g.flatten(1).norm(2, dim=1) - 1).square().mean(),  # WGAN-GP, DRAGAN
}
NAMES = {"square": "R1", "distance": "WGAN-GP"}


def penalty(function, *shape, dtype=torch.float32, quick=False):
    def build(implementation, dtype):
        gradient = numbers(*shape, dtype=dtype)
        weight = 10.0

        def ours(g):
            return sample_norms([[g]], function, 1.0, weight)

        def eager(g):
            return weight * EAGER[function](g.float() if g.element_size() < 4 else g)

        value_of = ours if implementation == "genkern" else eager
        value_of = compiled(value_of, implementation)

        def step():
            value = value_of(gradient)
            return value, *torch.autograd.grad(value, gradient)

        return step

    name = f"{shape[0]}×{math.prod(shape[1:])}"
    return Workload(f"{NAMES[function]} norms", name, dtype, build, quick=quick)


def penalties():
    """A batch of MNIST's size, of 64×64 and of 128×128 colour images."""
    return [
        penalty("square", 64, 1, 28, 28),
        penalty("square", 64, 3, 64, 64, quick=True),
        penalty("distance", 64, 3, 64, 64, quick=True),
        penalty("distance", 64, 3, 128, 128),
        penalty("distance", 64, 3, 64, 64, dtype=torch.bfloat16),
    ]
