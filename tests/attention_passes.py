"""Every pass of attention on the CPU, for tests that compare levels."""

import torch

import genkern


def passes(q, k, v, bias, **options):
    """name -> every result of every pass."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    generator = torch.Generator().manual_seed(1)
    draw = lambda x: torch.randn(x.shape, generator=generator).to(x.dtype)  # noqa: E731
    with genkern.use_backend("cpu"):
        out = genkern.attention(*leaves, bias, **options)
        cotangent = draw(out).requires_grad_()
        first = torch.autograd.grad(out, leaves, cotangent, create_graph=True)
        tangents = tuple(draw(x) for x in leaves)
        second = torch.autograd.grad(first, (*leaves, cotangent), tangents)
        _, tangent = torch.func.jvp(
            lambda *x: genkern.attention(*x, bias, **options), (q, k, v), tangents
        )
    names = ["out", "dq", "dk", "dv", "second-q", "second-k", "second-v", "second-dO", "tangent"]
    return dict(zip(names, (out, *first, *second, tangent), strict=True))
