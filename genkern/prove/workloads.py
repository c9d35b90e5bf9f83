"""What is executed: small, ragged shapes of every op, forward and backward."""

import torch
from torch import nn

import genkern
from genkern import losses
from genkern.bench.likelihood_workloads import gaussian_kl
from genkern.bench.loss_workloads import EAGER_D, adversarial
from genkern.bench.penalty_workloads import penalty
from genkern.bench.workload import Workload, numbers
from genkern.prove.attention import attention

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Weights(nn.Module):
    """Layers that do nothing but own a weight: a matrix, convolutions, a transposed one, and sums
    so long that they are split among blocks."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3, 33, 3, bias=False),
                nn.Conv2d(16, 40, 4, bias=False),
                nn.ConvTranspose2d(40, 9, 4, bias=False),
                nn.Linear(1300, 33, bias=False),
                nn.Linear(72, 300, bias=False),
                nn.Linear(40, 1, bias=False),
            ]
        )
        for layer in self.layers:
            layer.weight.data = layer.weight.data.bfloat16().float()

    def forward(self):
        return [layer.weight for layer in self.layers]


def spectral_norm(dtype):
    """A training step's: an update of u and v, the normalised weights, and their gradients."""

    def build(implementation, dtype):
        weights = Weights().double()  # so both begin with the same vectors, to the last digit
        if implementation == "genkern":
            genkern.spectral_norm(weights, recurse=True)
        else:
            for layer in weights.layers:
                nn.utils.parametrizations.spectral_norm(layer)
        weights.to(dtype)
        parameters = list(weights.parameters())
        cotangents = [numbers(*p.shape, dtype=dtype, grad=False) for p in parameters]

        def step():
            outputs = weights()
            return *outputs, *torch.autograd.grad(outputs, parameters, cotangents)

        return step

    return Workload("spectral_norm", "6 layers", dtype, build)


def discriminators(name, dtype, sizes=((2, 1, 7, 9), (2, 1, 30), (1, 1))):
    """A loss of the logits of several discriminators."""

    def build(implementation, dtype):
        real, fake = ([numbers(*size, dtype=dtype) for size in sizes] for _ in range(2))

        def step():
            if implementation == "genkern":
                loss = losses.get(name).d(real, fake)
            else:
                loss = sum(EAGER_D[name](r, f) for r, f in zip(real, fake, strict=True))
            return loss, *torch.autograd.grad(loss, [*real, *fake])

        return step

    return Workload(f"{name} D", f"{len(sizes)} discriminators", dtype, build)


def feature_matching(dtype, sizes=((2, 5, 7, 9), (2, 8, 300), (2, 3, 1))):
    def build(implementation, dtype):
        real, fake = (
            [[numbers(*size, dtype=dtype, grad=grad) for size in sizes]] for grad in (False, True)
        )

        def step():
            if implementation == "genkern":
                loss = losses.feature_matching(real, fake)
            else:
                pairs = zip(real[0], fake[0], strict=True)
                loss = 2 * sum((r - f).abs().mean() for r, f in pairs)
            return loss, *torch.autograd.grad(loss, fake[0])

        return step

    return Workload("feature_matching", f"{len(sizes)} maps", dtype, build)


def quick():
    """One or two of every op, bf16 and fp16 among them."""
    return [
        attention(1, 2, 67, 40, M=50, dv=24, dtype=BF16, is_causal=True),
        attention(1, 2, 37, 24, bias=True),
        attention(1, 1, 40, 16, M=70, dtype=BF16, derivative="second order"),
        attention(2, 1, 33, 16, dtype=FP16, derivative="jvp"),
        spectral_norm(FP32),
        spectral_norm(BF16),
        discriminators("hinge", FP32),
        discriminators("ragan", BF16),
        feature_matching(FP32),
        penalty("square", 5, 3, 7, 9),
        gaussian_kl(3, 8, 5, 7, dtype=BF16),
    ]


def everything():
    """The whole grid."""
    return [
        *_attentions(),
        *(spectral_norm(dtype) for dtype in (FP32, FP64, BF16, FP16)),
        *(discriminators(name, dtype) for name in EAGER_D for dtype in (FP32, FP64, BF16, FP16)),
        *(adversarial(name, "D", 20001, dtype=dtype) for name in EAGER_D for dtype in (FP32, FP16)),
        *(feature_matching(dtype) for dtype in (FP32, FP64, BF16, FP16)),
        *_penalties(),
        *_likelihoods(),
    ]


def _attentions():
    shapes = [
        ((1, 2, 67, 40), {"M": 50, "dv": 24}),
        ((2, 1, 130, 64), {"M": 33}),
        ((1, 1, 33, 128), {"dv": 64}),
        ((1, 1, 1, 16), {"M": 1}),
    ]
    features = [{}, {"is_causal": True}, {"window": (20, 8)}, {"softcap": 5.0}, {"bias": True}]
    for dtype in (FP32, BF16, FP16):
        for derivative in ("backward", "second order", "jvp"):
            for shape, sizes in shapes:
                yield attention(*shape, **sizes, dtype=dtype, derivative=derivative)
            for options in features:
                shape, options = (1, 2, 45, 24), {"key_heads": 1, **options}
                yield attention(*shape, dtype=dtype, derivative=derivative, **options)
        yield attention(1, 1, 70, 256, dtype=dtype)


def _penalties():
    for function in ("square", "distance"):
        for dtype in (FP32, FP64, BF16, FP16):
            for shape in ((5, 3, 7, 9), (2, 3, 40, 40)):
                yield penalty(function, *shape, dtype=dtype)


def _likelihoods():
    for another in (False, True):
        for dtype in (FP32, FP64, BF16, FP16):
            for shape in ((3, 8, 5, 7), (128, 64)):
                yield gaussian_kl(*shape, another=another, dtype=dtype)
