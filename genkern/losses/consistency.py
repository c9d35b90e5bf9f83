"""Consistency regularisation: what should look alike to the discriminator gets like logits."""

from genkern.ops.differences.op import differences


def cr(logits, augmented, *, weight=10.0):
    """weight · mean (D(x) - D(T(x)))²  (CR-GAN, Zhang et al. 2020, its λ = 10).

    logits, augmented: the discriminator's logits of real samples and of the same samples augmented,
    one shape; or lists of them by discriminator, whose penalties are added up. Gradients flow to
    both. Returns a 0-dim tensor to be added to the discriminator's loss.
    """
    return _mean_squares([("logits", logits, "augmented", augmented, weight)])


def bcr(real, augmented_real, fake, augmented_fake, *, real_weight=10.0, fake_weight=10.0):
    """real_weight · mean (D(x) - D(T(x)))² + fake_weight · mean (D(G(z)) - D(T(G(z))))²

    Balanced consistency (Zhao et al. 2021, section 2.2): `cr` for real and for fake samples. All
    four as the arguments of `cr`; a 0-dim tensor to be added to the discriminator's loss.
    """
    return _mean_squares(
        [
            ("real", real, "augmented_real", augmented_real, real_weight),
            ("fake", fake, "augmented_fake", augmented_fake, fake_weight),
        ]
    )


class LatentConsistency:
    """weight · mean (D(G(z)) - D(G(z + Δz)))²  and  -weight · mean (G(z) - G(z + Δz))²

    Latent consistency, zCR (Zhao et al. 2021, section 2.3), Δz a small normal noise: the
    discriminator should not tell G(z) from G(z + Δz), and the generator should. The weights are
    starting points.
    """

    def __repr__(self):
        return "genkern.losses.zcr"

    def d(self, fake, perturbed, *, weight=20.0):
        """The discriminator's: the logits of G(z) and of G(z + Δz), or lists of them."""
        return _mean_squares([("fake", fake, "perturbed", perturbed, weight)])

    def g(self, samples, perturbed, *, weight=0.5):
        """The generator's, negative: the samples G(z) and G(z + Δz), [B, …]. The mean is over all
        elements (as in StudioGAN), not a sum over those of a sample."""
        return _mean_squares([("samples", samples, "perturbed", perturbed, -weight)])


zcr = LatentConsistency()


def _mean_squares(terms):
    """Σ of weight · mean (a - b)² over (name of a, a, name of b, b, weight), lists taken apart."""
    names, a, b, weights = [], [], [], []
    for name_a, of_a, name_b, of_b, weight in terms:
        if isinstance(of_a, (list, tuple)) and isinstance(of_b, (list, tuple)):
            if len(of_a) != len(of_b) or not of_a:
                raise ValueError(
                    f"losses: {name_a} and {name_b} must hold as many discriminators' logits, at "
                    f"least one's, not {len(of_a)} and {len(of_b)}"
                )
            names += [(f"{name_a}[{i}]", f"{name_b}[{i}]") for i in range(len(of_a))]
        else:
            names.append((name_a, name_b))
            of_a, of_b = [of_a], [of_b]
        a += of_a
        b += of_b
        weights += [weight] * len(of_a)
    return differences(names, a, b, "square", weights)
