"""What the cross-entropy of a linear layer means, in plain PyTorch: any dtype, any number of
derivatives, and all logits in memory at once."""

import torch
import torch.nn.functional as F


def linear_cross_entropy(input, weight, bias, target, options):
    """loss of input [tokens, d], weight [V, d], bias [V] or None, target [tokens]; a tensor
    [tokens] where the reduction is "none". Half precision is computed in fp32 after the product."""
    logits = F.linear(input, weight, bias)
    logits = logits.float() if logits.element_size() < 4 else logits
    if options.softcap:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    losses = F.cross_entropy(
        logits,
        target,
        reduction="none",
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
    )
    counted = target != options.ignore_index
    if options.z_loss:
        losses = losses + counted * (options.z_loss * logits.logsumexp(1).square())
    return reduce(losses, counted, options.reduction)


def reduce(losses, counted, reduction):
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()
