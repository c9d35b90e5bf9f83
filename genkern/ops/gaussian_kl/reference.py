"""What the KL divergence of diagonal Gaussians means, in plain PyTorch."""


def gaussian_kl(mean, logvar, other_mean, other_logvar, reduction):
    """KL of N(mean, e^logvar) from N(other_mean, e^other_logvar), or from N(0, 1) where those are
    None, element by element, reduced. Half precision is computed in fp32."""
    mean, logvar, other_mean, other_logvar = (
        x.float() if x is not None and x.element_size() < 4 else x
        for x in (mean, logvar, other_mean, other_logvar)
    )
    if other_mean is None:
        terms = 0.5 * (logvar.exp() + mean.square() - 1 - logvar)
    else:
        away, difference = mean - other_mean, logvar - other_logvar
        terms = 0.5 * (difference.exp() + away.square() * (-other_logvar).exp() - 1 - difference)
    if reduction == "none":
        return terms
    return terms.sum() * factor(reduction, terms.shape)


def factor(reduction, shape):
    """What the sum is multiplied by."""
    count = {"sum": 1, "batchmean": shape[0] if shape else 1, "mean": shape.numel()}[reduction]
    return 1 / count if count else float("nan")
