"""Class-conditional discriminators: projection, auxiliary classifier, multi-hinge; and top-k.

Plain PyTorch: a class's logits are as few as the batch, and no pass over memory is worth a kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def projection(logits, features, class_vectors):
    """logits + ⟨class vector, features⟩, the projection discriminator (Miyato & Koyama 2018, eq. 3)

    logits: [B] or [B, 1], ψ(φ(x)). features: [B, C], φ(x). class_vectors: [B, C], one row of
    V = nn.Embedding(classes, C) a sample, V(labels) (spectrally normalised in SNGAN and BigGAN).
    Returns logits of the same shape, for any of the adversarial losses. Raises ValueError for
    other shapes.
    """
    if features.dim() != 2 or class_vectors.shape != features.shape:
        raise ValueError(
            f"losses.projection: features and class_vectors must be [batch, channels] both, not "
            f"{tuple(features.shape)} and {tuple(class_vectors.shape)}"
        )
    if logits.shape not in ((len(features),), (len(features), 1)):
        raise ValueError(
            f"losses.projection: logits must be [{len(features)}] or [{len(features)}, 1], like "
            f"the features, not {tuple(logits.shape)}"
        )
    return logits + (features * class_vectors).sum(1).view_as(logits)


class AuxiliaryClassifier:
    """weight · (CE(real, labels) + CE(fake, labels))  and  weight · CE(fake, labels)

    The class part of an AC-GAN (Odena et al. 2017, eq. 3), to be added to an adversarial loss. The
    paper trains the discriminator's classifier on both; many codebases (StudioGAN among them) on
    real samples alone: leave `fake` out. Class logits are [B, classes], labels [B] int64.
    """

    def __repr__(self):
        return "genkern.losses.auxiliary_classifier"

    def d(self, real, real_labels, fake=None, fake_labels=None, *, weight=1.0):
        """The discriminator's: mean cross-entropies of class logits, in fp32."""
        loss = _cross_entropy("real", real, "real_labels", real_labels)
        if fake is not None:
            loss = loss + _cross_entropy("fake", fake, "fake_labels", fake_labels)
        return weight * loss

    def g(self, fake, fake_labels, *, weight=1.0):
        """The generator's: that its samples are taken for the class that was asked for."""
        return weight * _cross_entropy("fake", fake, "fake_labels", fake_labels)


class MultiHinge:
    """The multi-hinge losses (Kavalerov et al. 2019) of a discriminator with K + 1 class logits,
    the last of which says "fake":

        d   mean max(0, 1 - D_y(x) + max_{k≠y} D_k(x)) + the same of fake samples with y = K
        g   mean max(0, 1 - D_y(G) + max_{k≠y} D_k(G)),  y the class that was asked for

    times `weight`. Crammer and Singer's multi-class hinge, as in its authors' code and in StudioGAN
    (whose generator takes it with weight 0.05, beside feature matching). Logits are [B, K + 1],
    labels [B] int64 in 0 … K - 1.
    """

    def __repr__(self):
        return "genkern.losses.multi_hinge"

    def d(self, real, fake, real_labels, *, weight=1.0):
        """The discriminator's loss of real samples of classes `real_labels` and of fake ones."""
        as_fake = torch.full((len(fake),), fake.shape[-1] - 1, device=fake.device)
        of_real = _crammer_singer("real", real, "real_labels", real_labels)
        return weight * (of_real + _crammer_singer("fake", fake, "fake", as_fake))

    def g(self, fake, fake_labels, *, weight=1.0):
        """The generator's loss of samples that were asked to be of `fake_labels`."""
        return weight * _crammer_singer("fake", fake, "fake_labels", fake_labels)


auxiliary_classifier = AuxiliaryClassifier()
multi_hinge = MultiHinge()


def top_k(fake, k, *, largest=True):
    """The logits of the k fake samples that look most real, for the generator's loss:
    `losses.hinge.g(losses.top_k(D(G(z)), k))` (Sinha et al. 2020, section 3).

    fake: [B, …], a sample's score being its mean logit; or a list of them by discriminator, each
    with its own best. k: 1 … B; the paper lets it fall from B to B/2, by 1 % an epoch. Returns
    [k, …], best first, with gradients of the chosen samples alone. largest=False where low logits
    mean real.
    """
    if isinstance(fake, (list, tuple)):
        return [top_k(logits, k, largest=largest) for logits in fake]
    if fake.dim() == 0 or not 1 <= k <= len(fake):
        raise ValueError(
            f"losses.top_k: k must be between 1 and the batch size of fake, "
            f"{tuple(fake.shape)}, not {k}"
        )
    scores = fake.detach().flatten(1).mean(1) if fake.dim() > 1 else fake.detach()
    return fake[scores.topk(k, largest=largest).indices]


def _check_labels(name, logits, labels_name, labels):
    if logits.dim() != 2:
        raise ValueError(f"losses: {name} must be [batch, classes], not {tuple(logits.shape)}")
    if not isinstance(labels, Tensor) or labels.shape != logits.shape[:1]:
        what = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"losses: {labels_name} must be a tensor of {len(logits)} labels, like {name}, not "
            f"{what}"
        )


def _cross_entropy(name, logits, labels_name, labels):
    _check_labels(name, logits, labels_name, labels)
    return F.cross_entropy(_wide(logits), labels)


def _crammer_singer(name, logits, labels_name, labels):
    _check_labels(name, logits, labels_name, labels)
    logits, column = _wide(logits), labels[:, None]
    others = logits.scatter(1, column, float("-inf")).amax(1)
    return F.relu(1 - logits.gather(1, column).squeeze(1) + others).mean()


def _wide(x):
    return x.float() if x.element_size() < 4 else x
