"""Gradient penalties: each differentiates a discriminator with respect to its input, and is itself
differentiable in the discriminator's weights.

What they share: penalties are 0-dim tensors in at least fp32, the squares are summed in fp32 (fp64
for fp64) in one pass over the gradient, and `scaler`, a torch.amp.GradScaler, multiplies its scale
into the inner gradient and out again in fp32, so that half-precision gradients don't underflow on
their way (the penalty itself is not scaled: call scaler.scale(loss) as usual).

A list of logits is a list of discriminators, whose penalties add up; a list of inputs with one
tensor of logits are the inputs of one discriminator, whose squares add up.
"""

import torch

from genkern.ops.sample_norms.op import sample_norms


def r1(logits, inputs, gamma=1.0, *, scaler=None):
    """R1: γ/2 · mean over samples of Σ (∂ΣD/∂x)²  (Mescheder et al. 2018, eq. 9).

    logits: the discriminator's output for `inputs`, any shape, still attached to its graph; or a
    list of the outputs of several discriminators. inputs: real samples `[batch, …]`, with
    requires_grad set before the discriminator saw them; a list where one discriminator has several
    inputs; beside a list of logits one tensor that all saw, or a list with one entry for each.
    Returns a 0-dim tensor, differentiable in the discriminators' weights.
    """
    return _penalty("losses.r1", logits, inputs, "square", weight=0.5 * gamma, scaler=scaler)


def r2(logits, inputs, gamma=1.0, *, scaler=None):
    """R2: `r1` at generated samples (Mescheder et al. 2018, eq. 10)."""
    return _penalty("losses.r2", logits, inputs, "square", weight=0.5 * gamma, scaler=scaler)


def wgan_gp(
    D,
    real,
    fake,
    *args,
    weight=10.0,
    center=1.0,
    one_sided=False,
    scaler=None,
    generator=None,
):
    """WGAN-GP: weight · mean_i (‖∇D(x̂_i)‖₂ - center)²  (Gulrajani et al. 2017, eq. 3).

    x̂_i = α_i · real_i + (1 - α_i) · fake_i with α_i uniform in [0, 1), one for each sample, drawn
    from `generator` (torch's global one by default). D is called once, as D(x̂, *args), and may
    return a list of several discriminators' logits. real, fake: `[batch, …]` of one shape, or lists
    of those (x̂ is then a list, with the same α_i). one_sided: max(‖∇‖ - center, 0)², the paper's
    section 4.
    """
    inputs = _between("losses.wgan_gp", real, fake, generator)
    function = "excess" if one_sided else "distance"
    return _penalty_of(
        "losses.wgan_gp", D, inputs, args, function, center=center, weight=weight, scaler=scaler
    )


def zero_centered_gp(D, real, fake, *args, weight=100.0, scaler=None, generator=None):
    """0-GP: weight · mean_i ‖∇D(x̂_i)‖²  (Thanh-Tung et al. 2019).

    The default weight is a starting point. Arguments as of `wgan_gp`.
    """
    inputs = _between("losses.zero_centered_gp", real, fake, generator)
    return _penalty_of(
        "losses.zero_centered_gp", D, inputs, args, "square", weight=weight, scaler=scaler
    )


def max_gp(D, real, fake, *args, weight=10.0, scaler=None, generator=None):
    """Max-GP: weight · max_i ‖∇D(x̂_i)‖²  (Zhou et al. 2019, Lipschitz GANs).

    The paper searches the weight; 10 is that of `wgan_gp`. Equal largest samples share the
    gradient. Arguments as of `wgan_gp`. Raises ValueError for an
    empty batch.
    """
    inputs = _between("losses.max_gp", real, fake, generator)
    return _penalty_of("losses.max_gp", D, inputs, args, "largest", weight=weight, scaler=scaler)


def dragan(
    D,
    real,
    *args,
    weight=10.0,
    center=1.0,
    noise=0.5,
    scaler=None,
    generator=None,
):
    """DRAGAN: weight · mean_i (‖∇D(x̂_i)‖₂ - center)² around real samples (Kodali et al. 2017).

    x̂_i = real_i + α_i · noise · std(real) · U, α_i uniform in [0, 1) for each sample and U for each
    element, as in the authors' code; std over the whole batch. Other arguments as of `wgan_gp`.
    """
    inputs = [_perturbed("losses.dragan", x, noise, generator) for x in _listed(real)]
    inputs = inputs if isinstance(real, (list, tuple)) else inputs[0]
    return _penalty_of(
        "losses.dragan", D, inputs, args, "distance", center=center, weight=weight, scaler=scaler
    )


def _listed(x):
    return list(x) if isinstance(x, (list, tuple)) else [x]


def _alpha(x, generator):
    shape = (x.shape[0], *[1] * (x.dim() - 1))
    return torch.rand(shape, dtype=x.dtype, device=x.device, generator=generator)


def _between(name, real, fake, generator):
    """Samples on the lines from fake to real, detached, that require gradients."""
    reals, fakes = _listed(real), _listed(fake)
    if isinstance(real, (list, tuple)) != isinstance(fake, (list, tuple)) or len(reals) != len(
        fakes
    ):
        raise ValueError(f"{name}: real and fake must both be tensors, or lists of one length")
    for a, b in zip(reals, fakes, strict=True):
        if a.shape != b.shape or a.dim() == 0:
            raise ValueError(
                f"{name}: real and fake must have one shape [batch, …], not {tuple(a.shape)} and "
                f"{tuple(b.shape)}"
            )
    with torch.no_grad():
        alpha = _alpha(reals[0], generator).flatten()
        mixed = [
            torch.lerp(b.detach(), a.detach(), alpha.to(a).view(-1, *[1] * (a.dim() - 1)))
            for a, b in zip(reals, fakes, strict=True)
        ]
    mixed = [x.requires_grad_() for x in mixed]
    return mixed if isinstance(real, (list, tuple)) else mixed[0]


def _perturbed(name, real, noise, generator):
    if real.dim() == 0:
        raise ValueError(f"{name}: real must have a shape [batch, …], not ()")
    with torch.no_grad():
        uniform = torch.rand(real.shape, dtype=real.dtype, device=real.device, generator=generator)
        step = _alpha(real, generator) * (noise * real.std())
        return torch.addcmul(real.detach(), uniform, step).requires_grad_()


def _penalty_of(name, D, inputs, args, function, **options):
    return _penalty(name, D(inputs, *args), inputs, function, **options)


def _penalty(name, logits, inputs, function, *, weight, center=0.0, scaler=None):
    one = not isinstance(logits, (list, tuple))
    if one:
        pairs = [(logits, _listed(inputs))]
    elif isinstance(inputs, (list, tuple)):
        if len(inputs) != len(logits):
            raise ValueError(
                f"{name}: inputs must be one tensor, or a list as long as that of logits, "
                f"{len(logits)}, not {len(inputs)}"
            )
        pairs = [(out, _listed(x)) for out, x in zip(logits, inputs, strict=True)]
    else:
        pairs = [(out, [inputs]) for out in logits]
    groups = [_gradients(name, out, xs, scaler) for out, xs in pairs]
    return sample_norms(groups, function, center, weight)


def _gradients(name, logits, inputs, scaler):
    for x in inputs:
        if not x.requires_grad:
            raise ValueError(
                f"{name}: inputs must require gradients before the discriminator sees them: call "
                f"inputs.requires_grad_() first"
            )
    if not logits.requires_grad:
        raise ValueError(f"{name}: logits must be attached to the graph that inputs went through")
    if scaler is None:
        return torch.autograd.grad(logits, inputs, torch.ones_like(logits), create_graph=True)
    scale = scaler.scale(torch.ones((), device=logits.device))
    slope = scale.to(logits.dtype).expand(logits.shape)
    gradients = torch.autograd.grad(logits, inputs, slope, create_graph=True)
    return [(g.float() if g.element_size() < 4 else g) / scale for g in gradients]
