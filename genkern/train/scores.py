"""How good are generated images? Numbers that can fail, beside those of real, held-out images.

All of them live in pixel space, with no downloaded network: that suits small, aligned images like
digits. For photographs they are a weak yardstick (two photographs of one thing are far apart).

- requested class: the share of samples in which a classifier that was trained on the real training
  images (a support vector machine) reads the class that was asked for;
- diversity: mean distance between samples of one class; small after a mode collapse;
- precision and recall (Kynkäänniemi et al. 2019): the share of samples inside the manifold of the
  held-out images, and the share of held-out images inside the manifold of the samples, a manifold
  being the balls that reach from each image to its k-th neighbour; equal numbers on both sides;
- copies: the share of samples closer to a training image than half the median such distance of
  held-out images.
"""

from typing import NamedTuple

import numpy as np
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

NEIGHBOURS = 5
MOST_IMAGES = 2000  # of each set: distances grow with the square


class Labelled(NamedTuple):
    """Images as rows [N, pixels], and their labels [N]."""

    images: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, images, labels):
        """From tensors [N, C, H, W] and [N]; a fixed random choice where there are too many."""
        chosen = _choice(len(images), MOST_IMAGES)
        return cls(images.flatten(1).double().numpy()[chosen], labels.numpy()[chosen])


class Score(NamedTuple):
    """`bar` is what `value` must reach, or stay below where `below` is set; None for no bar.
    `real` is the number to see it beside."""

    name: str
    value: float
    real: float
    bar: float | None
    below: bool = False
    share: bool = True  # shown in per cent
    beside: str = "real"

    @property
    def passed(self):
        if self.bar is None:
            return True
        return self.value < self.bar if self.below else self.value >= self.bar


def too_few(train_labels, held_out_labels):
    """Why scores can't be taken of such data, or None."""
    counts = np.bincount(held_out_labels)
    if len(counts) < 2 or len(np.unique(train_labels)) < 2:
        return "there is only one class"
    if counts.min() < 2:
        return "some class has fewer than 2 held-out images"
    if len(held_out_labels) <= NEIGHBOURS:
        return f"there are at most {NEIGHBOURS} held-out images"
    return None


def measure(train: Labelled, held_out: Labelled, samples: Labelled) -> list[Score]:
    """The scores of `samples`; `real` is the same number for the held-out images in their place
    (for precision and recall: for training images)."""
    classifier = SVC(C=10.0).fit(*train)
    n = min(len(train.images), len(held_out.images), len(samples.images))
    held_subset = held_out.images[_choice(len(held_out.images), n)]
    train_subset = train.images[_choice(len(train.images), n)]
    sample_subset = samples.images[_choice(len(samples.images), n)]
    precision, recall = precision_recall(held_subset, sample_subset)
    real_precision, real_recall = precision_recall(held_subset, train_subset)
    spread, real_spread = map(within_class_distance, (samples, held_out))
    nearest = NearestNeighbors(n_neighbors=1).fit(train.images)
    held_distances = nearest.kneighbors(held_out.images)[0]
    close = np.median(held_distances) / 2
    return [
        Score("requested class", classifier.score(*samples), classifier.score(*held_out), 0.90),
        Score("diversity", spread, real_spread, 0.60 * real_spread, share=False),
        Score("precision", precision, real_precision, None),
        Score("recall", recall, real_recall, 0.40 * real_recall),
        Score(
            "copies",
            np.mean(nearest.kneighbors(samples.images)[0] < close),
            np.mean(held_distances < close),
            0.01,
            below=True,
        ),
    ]


def within_class_distance(labelled: Labelled) -> float:
    """Mean over classes of the mean distance between two different images of the class."""
    means = []
    for label in np.unique(labelled.labels):
        members = labelled.images[labelled.labels == label]
        pairs = len(members) * (len(members) - 1)
        if pairs:
            means.append(pairwise_distances(members).sum() / pairs)
    return float(np.mean(means)) if means else 0.0


def precision_recall(real: np.ndarray, fake: np.ndarray) -> tuple[float, float]:
    """Shares of `fake` in the manifold of `real` and of `real` in that of `fake`."""
    distances = pairwise_distances(real, fake)
    in_real = (distances <= _radii(real)[:, None]).any(0)
    in_fake = (distances <= _radii(fake)[None, :]).any(1)
    return float(in_real.mean()), float(in_fake.mean())


def _radii(images):
    # The first neighbour of an image is itself.
    neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(images))).fit(images)
    return neighbours.kneighbors(images)[0][:, -1]


def _choice(n, most):
    """Indices of at most `most` of n things, the same ones every time."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, most, replace=False))
