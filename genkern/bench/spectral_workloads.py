"""Spectral normalization of whole discriminators: ours, torch's parametrization, and a floor.

"forward" is what every forward of a discriminator pays in training: an update of u and v and the
normalised weight of each layer. The other is that and its backward. "floor" is a plain loop that
reads and writes the weights as often as our kernels and computes next to nothing, into outputs
allocated as ours are.
"""

from functools import partial

import torch
from torch import nn

import genkern
from genkern.bench.workload import Workload, compiled, numbers
from genkern.ops.spectral_norm.blocks import Blocks

# (rows, cols) of each layer's matrix. SNGAN: Miyato et al. 2018, the ResNets for 32² and 128²;
# DCGAN-64: Radford et al. 2016 with 128 first channels; HiFi-GAN: the first of the multi-scale
# discriminators, the only one with spectral norm; SAGAN-128: Zhang et al. 2019's own code, with
# self-attention at 32² and a projection onto 1000 classes.
DISCRIMINATORS = {
    "SNGAN-32": [
        *[(128, 27), (128, 1152), (128, 3)],
        *[(128, 1152), (128, 1152), (128, 128)],
        *[(128, 1152)] * 4,
        (1, 128),
    ],
    "DCGAN-64": [(128, 48), (256, 2048), (512, 4096), (1024, 8192), (1, 16384)],
    "HiFi-GAN MSD": [
        *[(128, 15), (128, 1312), (256, 328), (512, 656)],
        *[(1024, 1312), (1024, 2624), (1024, 5120), (1, 3072)],
    ],
    "SNGAN-128": [
        *[(64, 27), (64, 576), (64, 3)],
        *[(64, 576), (128, 576), (128, 64)],
        *[(128, 1152), (256, 1152), (256, 128)],
        *[(256, 2304), (512, 2304), (512, 256)],
        *[(512, 4608), (1024, 4608), (1024, 512)],
        *[(1024, 9216)] * 2,
        (1, 1024),
    ],
    "SAGAN-128": [
        *[(64, 27), (64, 576), (64, 3)],
        *[(128, 576), (128, 1152), (128, 64)],
        *[(16, 128), (16, 128), (64, 128), (128, 64)],
        *[(256, 1152), (256, 2304), (256, 128)],
        *[(512, 2304), (512, 4608), (512, 256)],
        *[(1024, 4608), (1024, 9216), (1024, 512)],
        *[(1024, 9216)] * 2,
        *[(1, 1024), (1000, 1024)],
    ],
}


class Weights(nn.Module):
    """Layers that do nothing but own a weight: the normalization alone is measured."""

    def __init__(self, shapes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(cols, rows, bias=False) for rows, cols in shapes)
        for layer in self.layers:
            layer.weight.data = layer.weight.data.bfloat16().float()

    def forward(self):
        return [layer.weight for layer in self.layers]


def normalized(model, implementation, dtype):
    """A discriminator's weights under the spectral norm of `implementation`."""
    weights = Weights(DISCRIMINATORS[model])
    if implementation == "genkern":
        genkern.spectral_norm(weights, recurse=True)
    else:
        for layer in weights.layers:
            nn.utils.parametrizations.spectral_norm(layer)
    return weights.to(dtype)


class Floor:
    """The same reads and writes: forward W, W, and W → Ŵ; backward dŴ and Ŵ, and dŴ → dW."""

    def __init__(self, model):
        self.weights = [layer.weight.detach() for layer in Weights(DISCRIMINATORS[model]).layers]
        self.blocks = Blocks()

    def forward(self):
        return [self._copy(w, reads=2) for w in self.weights]

    def backward(self, outputs, cotangents):
        grads = []
        for output, cotangent in zip(outputs, cotangents, strict=True):
            output.sum()
            grads.append(self._copy(cotangent, reads=1))
        return grads

    def _copy(self, source, reads):
        for _ in range(reads):
            source.sum()
        return self.blocks.empty_like(source).copy_(source)


def spectral_norm(model, derivative="backward", quick=False):
    def build(implementation, dtype):
        cotangents = [
            numbers(rows, cols, dtype=dtype, grad=False) for rows, cols in DISCRIMINATORS[model]
        ]
        if implementation == "floor":
            floor = Floor(model)
            forward, backward = floor.forward, floor.backward
        else:
            weights = normalized(model, implementation, dtype)
            forward = compiled(weights, implementation)
            parameters = list(weights.parameters())
            backward = partial(_gradients, parameters)

        def step():
            outputs = forward()
            return *outputs, *backward(outputs, cotangents)

        return forward if derivative == "forward" else step

    op = "spectral_norm forward" if derivative == "forward" else "spectral_norm"
    return Workload(op, model, torch.float32, build, ("compile", "floor"), quick)


def _gradients(parameters, outputs, cotangents):
    return torch.autograd.grad(outputs, parameters, cotangents)


def spectral_norms():
    """All five discriminators; those of 32² and 64² images and of audio are quick."""
    for derivative in ("backward", "forward"):
        for model in DISCRIMINATORS:
            yield spectral_norm(model, derivative, quick=not model.endswith("-128"))
