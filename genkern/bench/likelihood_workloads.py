"""Losses of likelihood: a language model's last layer with its loss, a VAE's KL."""

import torch
import torch.nn.functional as F

from genkern import losses
from genkern.bench.workload import Workload, compiled, numbers


def linear_cross_entropy(tokens, d, classes, dtype=torch.float32, quick=False):
    def build(implementation, dtype):
        states, weight = numbers(tokens, d, dtype=dtype), numbers(classes, d, dtype=dtype)
        with torch.no_grad():
            weight.mul_(d**-0.5)
        target = torch.randint(classes, (tokens,))

        def eager(x, w, target):
            return F.cross_entropy(F.linear(x, w), target)

        ours = implementation == "genkern"
        loss_of = compiled(losses.linear_cross_entropy if ours else eager, implementation)

        def step():
            loss = loss_of(states, weight, target)
            return loss, *torch.autograd.grad(loss, (states, weight))

        return step

    return Workload("linear_cross_entropy", f"{tokens}×{d}×{classes}", dtype, build, quick=quick)


def gaussian_kl(*shape, another=False, dtype=torch.float32, quick=False):
    """Halves of an encoder's output `shape`, from the standard normal or from a prior's."""

    def build(implementation, dtype):
        encoded = [numbers(*shape, dtype=dtype) for _ in range(2 if another else 1)]

        def eager(encoded):
            mean, logvar, *other = [h for x in encoded for h in x.chunk(2, 1)]
            if not other:
                terms = -0.5 * (1 + logvar - mean.pow(2) - logvar.exp())
            else:
                m, k = other
                terms = 0.5 * (k - logvar - 1 + (logvar - k).exp() + (mean - m).pow(2) * (-k).exp())
            return terms.sum() / len(mean)

        def ours(encoded):
            return losses.gaussian_kl(*[h for x in encoded for h in x.chunk(2, 1)])

        kl_of = compiled(ours if implementation == "genkern" else eager, implementation)

        def step():
            kl = kl_of(encoded)
            return kl, *torch.autograd.grad(kl, encoded)

        return step

    op = "gaussian_kl of two" if another else "gaussian_kl"
    return Workload(op, "×".join(map(str, shape)), dtype, build, quick=quick)


def likelihoods():
    """A language model's last layer; latents of a small VAE, of an image VAE, of a prior's."""
    return [
        linear_cross_entropy(1024, 256, 8000, quick=True),
        linear_cross_entropy(4096, 512, 32000),
        linear_cross_entropy(4096, 512, 32000, dtype=torch.bfloat16),
        gaussian_kl(128, 64),
        gaussian_kl(16, 8, 64, 64, quick=True),
        gaussian_kl(16, 8, 64, 64, another=True),
    ]
