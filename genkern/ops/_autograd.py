"""Second derivatives by the reference, for ops whose kernels give the first."""

import torch


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
