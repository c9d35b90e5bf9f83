"""Passes of second order in plain PyTorch, after a forward that no backend at hand can follow. They
store the N×M matrix."""

from genkern.ops.attention import reference


def second(inputs, fixed, settings, rows, grad_out, grad_lse, tangents, wanted=(True,) * 7):
    """The gradients of ⟨backward's results, tangents⟩ for the inputs, grad_out and grad_lse."""
    found = reference.second(inputs, fixed, settings, grad_out, grad_lse, tangents)
    return tuple(x if want else None for x, want in zip(found, wanted, strict=True))


def jvp(inputs, fixed, settings, rows, tangents):
    """The derivatives of out and lse along the tangents of the inputs."""
    return reference.jvp(inputs, fixed, settings, tangents)
