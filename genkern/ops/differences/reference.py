"""What mean differences are, in plain PyTorch: any dtype, any number of derivatives."""

DISTANCE = {"absolute": lambda d: d.abs(), "square": lambda d: d * d}


def differences(a, b, distance, weights):
    """Σ over pairs of weight · mean φ(a - b), φ(d) = |d| or d². Half precision is computed in
    fp32."""
    phi = DISTANCE[distance]
    terms = [
        weight * phi(_wide(x) - _wide(y)).mean() for x, y, weight in zip(a, b, weights, strict=True)
    ]
    return sum(terms[1:], terms[0])


def _wide(x):
    return x.float() if x.element_size() < 4 else x
