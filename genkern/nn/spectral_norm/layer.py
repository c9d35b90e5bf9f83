"""The parametrization that a normalised weight carries."""

import torch
import torch.nn.functional as F
from torch import nn

from genkern import backend as backends
from genkern.nn.spectral_norm import checkpoints
from genkern.nn.spectral_norm.frames import result_for
from genkern.ops.spectral_norm.op import spectral_norm as normalize
from genkern.ops.spectral_norm.reference import ORDERS, spectral_norm

WARM_UP = 15


class SpectralNorm(nn.Module):
    """The parametrization W → W / σ(W), with buffers _u `[rows]` and _v `[cols]`.

    A 1-D weight is divided by its norm and has no buffers; with order "v_first" it is a matrix of
    one column, as in torch's legacy hook. `vectors`: u and v to go on from, instead of random ones
    after 15 iterations.
    """

    def __init__(
        self, weight, n_power_iterations=1, dim=0, eps=1e-12, order="u_first", vectors=None
    ):
        super().__init__()
        if not -weight.ndim <= dim < weight.ndim:
            raise IndexError(
                f"spectral_norm: dim must be in [{-weight.ndim}, {weight.ndim - 1}] for a weight "
                f"of shape {tuple(weight.shape)}, not {dim}"
            )
        if n_power_iterations <= 0:
            raise ValueError(
                f"spectral_norm: n_power_iterations must be positive, not {n_power_iterations}"
            )
        if order not in ORDERS:
            raise ValueError(f"spectral_norm: order must be 'u_first' or 'v_first', not {order!r}")
        self.dim = dim % weight.ndim
        self.eps = eps
        self.n_power_iterations = n_power_iterations
        self.order = order
        if weight.ndim == 1 and order == "u_first":
            return
        if vectors is None:
            vectors = self._random_vectors(as_matrix(weight))
        for name, vector in zip(("_u", "_v"), vectors, strict=True):
            self.register_buffer(name, vector)

    def _random_vectors(self, weight):
        rows = weight.shape[self.dim]
        cols = weight.numel() // rows if rows else weight[..., :0].numel()
        with torch.no_grad():
            u, v = (
                F.normalize(weight.new_empty(length).normal_(0, 1), dim=0, eps=self.eps)
                for length in (rows, cols)
            )
            self._normalize(weight, u, v, WARM_UP, update=True)
        return u, v

    @property
    def has_vectors(self):
        return "_u" in self._buffers

    def forward(self, weight):
        if not self.has_vectors:
            return F.normalize(weight, dim=0, eps=self.eps)
        if torch.compiler.is_compiling():
            return self._compiled(weight)
        ready = self.ready(weight)
        if ready is None:
            ready = checkpoints.noted_result(self, weight)
        if ready is not None:
            return ready
        (start,) = checkpoints.starts([self])
        return self._normalize(weight, *start)

    def _compiled(self, weight):
        moving = self.training
        normalized = self._normalize(weight, self._u, self._v, self.iterations(), moving)
        if moving:
            # Changes nothing, but lets a compiler see that the module does: one that is to repeat
            # this under activation checkpointing would do so from the new vectors, and refuses.
            self._u, self._v = self._u, self._v
        return normalized

    def ready(self, weight):
        """Ŵ, where a running forward of a whole model has it; None otherwise. Not for compilers."""
        result = result_for(self, weight)
        if result is None:
            return None
        checkpoints.note_result(self, result)
        return result.normalized

    def iterations(self):
        return self.n_power_iterations if self.training else 0

    def _normalize(self, weight, u, v, iterations, update):
        if weight.is_complex():
            return self._normalize_complex(weight, u, v, iterations, update)
        (normalized,) = normalize(
            [as_matrix(weight)],
            [u],
            [v],
            [self.dim],
            n_power_iterations=iterations,
            eps=self.eps,
            order=self.order,
            update=update,
        ).weights
        return normalized if weight.ndim > 1 else normalized.squeeze(1)

    def _normalize_complex(self, weight, u, v, iterations, update):
        backends.record("spectral_norm", "reference", "complex weights: plain torch operations")
        settings = [self.dim], [iterations], self.eps, self.order
        matrices = [as_matrix(weight)]
        (normalized,), _, (new_u,), (new_v,) = spectral_norm(matrices, [u], [v], *settings)
        if update:
            u.copy_(new_u), v.copy_(new_v)
        return normalized.view_as(weight)

    def right_inverse(self, value):
        return value

    def extra_repr(self):
        return (
            f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, eps={self.eps}, "
            f"order={self.order!r}"
        )


def as_matrix(weight):
    """The weight with two dimensions at least."""
    return weight if weight.ndim > 1 else weight.unsqueeze(1)


def normalization(module, name):
    """The `SpectralNorm` that is the first parametrization of this weight, or None."""
    chains = module._modules.get("parametrizations")
    # Not by the containers' own indexing, which would take most of a small model's time.
    chain = None if chains is None else chains._modules.get(name)
    first = None if chain is None else chain._modules.get("0")
    return first if isinstance(first, SpectralNorm) else None
