"""What the ops share of autograd: a short way in, and second derivatives by the reference."""

import torch
from torch.autograd import forward_ad

transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def direct_apply(function):
    """A faster `function.apply` for where no transform of torch.func is about.

    torch.autograd.Function.apply is Python that looks for functorch's transforms first: 5 µs of a
    call that takes 30.
    """
    return super(torch.autograd.Function, function).apply


def entry(function):
    """`direct_apply` for an autograd.Function that torch.func cannot transform: under a transform
    `function.apply` is called all the same, and raises its own error."""
    direct = direct_apply(function)

    def apply(*args):
        return function.apply(*args) if transforms_active() else direct(*args)

    return apply


def no_transforms(op):
    """The sentence for transforms that the kernels don't know."""
    return (
        f"{op}: torch.func transforms (jvp, vmap, grad, …) and forward-mode differentiation are "
        f"not supported by the kernels: run it, uncompiled, inside "
        f'genkern.use_backend("reference")'
    )


def has_tangent(*tensors):
    """Whether forward-mode differentiation runs through any of these (None is skipped)."""
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def refuse_tangents(op, *tensors):
    """Raises NotImplementedError where torch.library's custom_op would drop a tangent, and the
    derivative would be zero without a word. For the implementation of a library op."""
    if has_tangent(*tensors):
        raise NotImplementedError(no_transforms(op))


def refuse_tracing_tangents(op):
    """The same for the fake implementation, whose tensors can't be asked for their tangents."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(no_transforms(op))


def differentiable_gradients(reference, inputs, grad_outputs):
    """The gradients of `reference(*inputs)`, themselves differentiable any number of times.

    For a backward that runs under create_graph: kernels would cut the graph there, and a penalty
    built on it would vanish without a word. `inputs` may hold None and tensors that need no
    gradient; both get None. `grad_outputs` matches the outputs of `reference`, None meaning zero.
    """
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    outputs = reference(*inputs)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None]
    if not wanted or not pairs:
        return [None] * len(inputs)
    gradients = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(gradients) if x is not None and x.requires_grad else None for x in inputs]
