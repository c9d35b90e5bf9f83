"""Losses of models that are trained by likelihood: a language model's cross-entropy, a VAE's KL."""

from genkern.ops.gaussian_kl.op import gaussian_kl as _gaussian_kl
from genkern.ops.linear_cross_entropy.op import Options
from genkern.ops.linear_cross_entropy.op import linear_cross_entropy as _linear_cross_entropy


def linear_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=None,
    z_loss=0.0,
):
    """F.cross_entropy(F.linear(input, linear_weight, linear_bias), target) without the logits.

    The logits exist for a chunk of tokens at a time, so memory beside the gradients is 64 MiB, not
    tokens × classes. Arguments are those of torch's own `F.linear_cross_entropy`.

    Args:
        input: `[*, d]`, the last hidden states; float32, float64, bfloat16 or float16.
        linear_weight: `[V, d]`. linear_bias: `[V]`, or None. Both of input's dtype; under autocast
            all three are cast as torch's linear casts them.
        target: `[*]`, int64, classes in [0, V), or `ignore_index`: such tokens count nothing.
        reduction: "mean" over the tokens that count (NaN if none does), "sum", or "none".
        label_smoothing: ε of Szegedy et al. 2016, as in F.cross_entropy.
        softcap: c of softcap: logits become c · tanh(logits / c) (Gemma 2); None for none.
        z_loss: adds z_loss · logsumexp(logits)² to a token's loss (PaLM: 1e-4).

    Returns a 0-dim tensor, for "none" one of target's shape, in fp32 (fp64 for fp64). Derivatives
    of the gradients are those of plain PyTorch, logits and all. Raises TypeError or ValueError,
    naming the argument, and IndexError for a target out of range.
    """
    options = Options(
        ignore_index,
        float(label_smoothing),
        0.0 if softcap is None else float(softcap),
        float(z_loss),
        reduction,
    )
    return _linear_cross_entropy(input, linear_weight, linear_bias, target, options)


def gaussian_kl(mean, logvar, other_mean=None, other_logvar=None, *, reduction="batchmean"):
    """KL of the diagonal Gaussian N(mean, e^logvar) from N(0, 1), or from another's parameters.

    Of one element ½ (μ² + e^l - 1 - l)  (Kingma & Welling 2014, appendix B), and from another
    Gaussian ½ (e^(l - k) + (μ - m)² e^-k - 1 - (l - k)).

    Args:
        mean, logvar: one shape `[batch, …]`, one floating dtype; logvar is the logarithm of the
            variance. Halves of an encoder's output (`chunk`) go in without a copy.
        other_mean, other_logvar: of a shape that broadcasts to mean's; a learned prior, say.
        reduction: "batchmean" (the sum over a sample, the mean over the batch: the bound's KL),
            "sum", "mean" (over all elements) or "none" (an element each).

    Returns a 0-dim tensor, for "none" one of mean's shape, in fp32 (fp64 for fp64). Raises
    TypeError or ValueError, naming the argument.
    """
    return _gaussian_kl(mean, logvar, other_mean, other_logvar, reduction)
