"""The scores: real digits pass, and each kind of bad sample trips its own bar."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from genkern.train import scores
from genkern.train.scores import Labelled


@pytest.fixture(scope="module")
def digits():
    """Digits to train on, held out, and as samples: three disjoint sets."""
    data = load_digits()
    images, labels = data.data / 8 - 1, data.target
    thirds = np.random.default_rng(0).permutation(len(images)) % 3
    return [Labelled(images[thirds == i], labels[thirds == i]) for i in range(3)]


def verdicts(digits, samples):
    train, held_out, _ = digits
    return {score.name: score.passed for score in scores.measure(train, held_out, samples)}


def test_real_digits_pass(digits):
    assert all(verdicts(digits, digits[2]).values())


def test_wrong_labels_fail(digits):
    images, labels = digits[2]
    wrong = labels.copy()
    wrong[::5] = (wrong[::5] + 1) % 10
    assert not verdicts(digits, Labelled(images, wrong))["requested class"]


def test_collapsed_samples_fail(digits):
    """One image a class, with a little noise: every one is read right."""
    images, labels = digits[2]
    chosen = np.array([np.flatnonzero(labels == label)[0] for label in labels])
    collapsed = images[chosen] + 0.05 * np.random.default_rng(0).standard_normal(images.shape)
    result = verdicts(digits, Labelled(collapsed, labels))
    assert result["requested class"]
    assert not result["diversity"]
    assert not result["recall"]


def test_copies_fail(digits):
    """Two in a hundred samples are training images, all but unchanged."""
    images, labels = digits[2]
    train, _, _ = digits
    images, labels = images.copy(), labels.copy()
    images[::50], labels[::50] = train.images[: len(images[::50])] + 0.01, 0
    assert not verdicts(digits, Labelled(images, labels))["copies"]


def test_samples_of_three_classes_only_fail_recall(digits):
    """Images of 0, 1 and 2, rightly labelled."""
    images, labels = digits[2]
    fold = labels % 3
    chosen = np.array([np.flatnonzero(labels == label)[i % 50] for i, label in enumerate(fold)])
    assert not verdicts(digits, Labelled(images[chosen], fold))["recall"]


def test_precision_and_recall_of_known_sets():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((200, 2))
    assert scores.precision_recall(real, real) == (1.0, 1.0)
    assert scores.precision_recall(real, real + 100) == (0.0, 0.0)
    narrow = real[np.abs(real).max(1) < 0.5]
    precision, recall = scores.precision_recall(real, narrow)
    assert precision == 1.0 and recall < 0.5


def test_within_class_distance_by_hand():
    images = np.array([[0.0], [2.0], [10.0], [11.0], [50.0]])
    labels = np.array([0, 0, 1, 1, 2])
    assert scores.within_class_distance(Labelled(images, labels)) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("train", "held_out", "reason"),
    [
        ([0] * 9, [0] * 9, "one class"),
        ([0, 1] * 9, [0] * 8 + [1], "fewer than 2 held-out"),
        ([0, 1] * 9, [0, 0, 1, 1], "at most 5 held-out"),
        ([0, 1] * 9, [0, 1] * 9, None),
    ],
)
def test_too_few(train, held_out, reason):
    said = scores.too_few(np.array(train), np.array(held_out))
    assert said is None if reason is None else reason in said
