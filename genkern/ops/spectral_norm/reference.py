"""What spectral normalization means, in plain PyTorch: any dtype, any number of derivatives.

A weight W is seen as a matrix [rows, cols], dimension `dim` first. norm(x) = x / max(‖x‖, eps).

    u first (torch's parametrization):   u ← norm(W v), v ← norm(Wᵀ u), n times
    v first (torch's older hook):        v ← norm(Wᵀ u), u ← norm(W v), n times
    σ = u·(W v)      Ŵ = W / σ

u and v are constants to autograd. Half precision is computed in fp32, and u and v come out in it.
Of complex weights Wᵀ is the conjugate transpose, and u·x has u conjugated.
"""

import torch
import torch.nn.functional as F

from genkern.ops._tensors import ARITHMETIC

ORDERS = ("u_first", "v_first")


def as_matrix(weight, dim):
    """[rows, cols], `dim` being the rows."""
    return weight.movedim(dim, 0).flatten(1)


def power_iterations(matrix, u, v, iterations, eps, order):
    """(u, v) after so many iterations, without gradients."""
    with torch.no_grad():
        for _ in range(iterations):
            if order == "u_first":
                u = F.normalize(torch.mv(matrix, v), dim=0, eps=eps)
                v = F.normalize(torch.mv(matrix.mH, u), dim=0, eps=eps)
            else:
                v = F.normalize(torch.mv(matrix.mH, u), dim=0, eps=eps)
                u = F.normalize(torch.mv(matrix, v), dim=0, eps=eps)
    return u, v


def spectral_norm(weights, us, vs, dims, iterations, eps, order):
    """(normalized, sigma, us, vs): lists, and σ of all weights as one tensor [len(weights)].

    `dims` and `iterations` hold one number a weight.
    """
    normalized, sigmas, new_us, new_vs = [], [], [], []
    for weight, u, v, dim, n in zip(weights, us, vs, dims, iterations, strict=True):
        dtype = ARITHMETIC.get(weight.dtype, weight.dtype)
        wide = weight.to(dtype)
        matrix = as_matrix(wide, dim)
        u, v = power_iterations(matrix, u.to(dtype), v.to(dtype), n, eps, order)
        sigma = torch.vdot(u, torch.mv(matrix, v))
        normalized.append((wide / sigma).to(weight.dtype))
        sigmas.append(sigma)
        new_us.append(u)
        new_vs.append(v)
    return normalized, torch.stack(sigmas), new_us, new_vs


def gradient(grad_normalized, grad_sigma, normalized, sigma, u, v, dim):
    """The gradient of one weight, of its Ŵ and σ alone: W itself may have changed since.

    dW = (dŴ - ⟨dŴ, Ŵ⟩ u vᵀ) / σ + dσ u vᵀ        (either cotangent may be None: zero)

    Differentiable any number of times where Ŵ and σ are part of a graph.
    """
    along = _rank_one(normalized, u, v, dim)
    terms = []
    if grad_normalized is not None:
        wide = grad_normalized.to(along.dtype)
        overlap = (wide * normalized.to(along.dtype)).sum()
        terms.append((wide - overlap * along) / sigma)
    if grad_sigma is not None:
        terms.append(grad_sigma * along)
    return sum(terms[1:], terms[0]).to(normalized.dtype)


def _rank_one(weight, u, v, dim):
    """u vᵀ in the shape of `weight`."""
    shape = list(weight.shape)
    rows = shape.pop(dim)
    return torch.outer(u, v).view(rows, *shape).movedim(0, dim)
