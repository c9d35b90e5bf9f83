"""What norms of samples mean, in plain PyTorch: any dtype, any number of derivatives."""

import torch


def sample_norms(groups, function, center, weight):
    """groups: lists of tensors [B, …]; s_i is the sum of squares of sample i over a list.

    "squares": s [B] of the one group. Otherwise weight · Σ over groups of: "square" mean s_i;
    "distance" mean (√s_i - center)²; "excess" mean max(√s_i - center, 0)²; "largest" max s_i. Half
    precision is computed in fp32.
    """
    if function == "squares":
        return _squares(groups[0])
    return weight * sum(_one(group, function, center) for group in groups)


def _one(group, function, center):
    if function == "square":
        return _squares(group).mean()
    if function == "largest":
        return _squares(group).max()
    # The norm, not the root of the squares: its slope at zero is zero.
    beyond = torch.linalg.vector_norm(_rows(group), dim=1) - center
    return (beyond if function == "distance" else beyond.relu()).square().mean()


def _squares(group):
    return _rows(group).square().sum(1)


def _rows(group):
    wide = [x.float() if x.element_size() < 4 else x for x in group]
    return torch.cat([x.reshape(x.shape[0], x[:1].numel() if x.numel() else 0) for x in wide], 1)
