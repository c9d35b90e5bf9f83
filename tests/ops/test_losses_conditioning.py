"""Projection, auxiliary classifier, multi-hinge and top-k against loops over samples."""

import pytest
import torch

from genkern import losses


def numbers(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_projection(shape):
    logits, features, vectors = numbers(*shape), numbers(5, 7), numbers(5, 7)
    got = losses.projection(logits, features, vectors)
    assert got.shape == shape
    for i in range(5):
        expected = logits.flatten()[i] + features[i] @ vectors[i]
        torch.testing.assert_close(got.flatten()[i], expected)
    assert torch.autograd.gradgradcheck(losses.projection, (logits, features, vectors))


def test_auxiliary_classifier():
    real, fake = numbers(6, 4), numbers(6, 4)
    y, z = torch.randint(4, (6,)), torch.randint(4, (6,))

    def entropy(logits, labels):
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        return -sum(p[i, labels[i]].log() for i in range(6)) / 6

    ac = losses.auxiliary_classifier
    torch.testing.assert_close(ac.d(real, y, fake, z), entropy(real, y) + entropy(fake, z))
    torch.testing.assert_close(ac.d(real, y, weight=0.5), 0.5 * entropy(real, y))
    torch.testing.assert_close(ac.g(fake, z), entropy(fake, z))
    assert ac.g(fake.bfloat16(), z).dtype == torch.float32


def test_multi_hinge():
    real, fake = numbers(6, 5), numbers(6, 5)  # 4 classes and "fake"
    y, z = torch.randint(4, (6,)), torch.randint(4, (6,))

    def hinge(logits, labels):
        total = 0
        for i in range(len(logits)):
            others = [logits[i, k] for k in range(5) if k != labels[i]]
            total = total + torch.relu(1 - logits[i, labels[i]] + torch.stack(others).max())
        return total / len(logits)

    as_fake = torch.full((6,), 4)
    expected = hinge(real, y) + hinge(fake, as_fake)
    got = losses.multi_hinge.d(real, fake, y)
    torch.testing.assert_close(got, expected)
    for inputs in ([real], [fake]):
        torch.testing.assert_close(
            torch.autograd.grad(got, inputs, retain_graph=True),
            torch.autograd.grad(expected, inputs, retain_graph=True),
        )
    torch.testing.assert_close(losses.multi_hinge.g(fake, z, weight=0.05), 0.05 * hinge(fake, z))


def test_top_k():
    fake = torch.tensor([0.5, -1.0, 3.0, 2.0], requires_grad=True)
    best = losses.top_k(fake, 2)
    assert best.tolist() == [3.0, 2.0]
    losses.hinge.g(best).backward()
    assert fake.grad.tolist() == [0.0, 0.0, -0.5, -0.5]
    assert losses.top_k(fake, 1, largest=False).tolist() == [-1.0]
    patches = torch.tensor([[[0.0, 4.0]], [[3.0, 3.0]], [[1.0, -1.0]]])
    assert torch.equal(losses.top_k(patches, 2), patches[[1, 0]])
    lists = losses.top_k([fake, patches], 1)
    assert lists[0].tolist() == [3.0] and torch.equal(lists[1], patches[1:2])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: losses.top_k(torch.ones(3), 4), "k must be between 1 and the batch size"),
        (lambda: losses.top_k(torch.ones(()), 1), "k must be between 1"),
        (
            lambda: losses.projection(torch.ones(3), torch.ones(3, 2), torch.ones(3, 4)),
            r"must be \[batch, channels\] both, not \(3, 2\) and \(3, 4\)",
        ),
        (
            lambda: losses.projection(torch.ones(2), torch.ones(3, 2), torch.ones(3, 2)),
            r"logits must be \[3\] or \[3, 1\], like the features, not \(2,\)",
        ),
        (
            lambda: losses.multi_hinge.g(torch.ones(3, 2), torch.ones(2).long()),
            "fake_labels must be a tensor of 3 labels, like fake, not",
        ),
        (
            lambda: losses.auxiliary_classifier.g(torch.ones(3), torch.ones(3).long()),
            r"fake must be \[batch, classes\], not \(3,\)",
        ),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
