"""LMTrainer, the transformer, and the perplexities that they are judged by."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import genkern
from genkern.train import LMTrainer
from genkern.train.data import text
from genkern.train.errors import TrainError
from genkern.train.models import ByteTransformer
from genkern.train.models.byte_transformer import continue_text


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return ByteTransformer(16, width=16, layers=2, heads=2).to(dtype)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_backends_train_alike(dtype, within):
    tokens = torch.randint(256, (20, 4, 17))
    losses = {}
    for backend in ("reference", "cpu"):
        trainer = LMTrainer(make_model(dtype))
        with genkern.use_backend(backend), genkern.explain() as log:
            losses[backend] = torch.stack([trainer.step(batch).loss for batch in tokens])
        assert {c.backend for c in log if c.op.startswith("attention")} == {backend}
    assert (losses["cpu"] - losses["reference"]).abs().max() <= within
    assert losses["cpu"].dtype == dtype


def test_learns_a_repeated_text():
    tokens = torch.tensor(list(b"abcabcabcabcabcab"))[None]
    trainer = LMTrainer(make_model(), lr=1e-2)
    first = trainer.step(tokens).loss
    for _ in range(60):
        last = trainer.step(tokens).loss
    assert abs(first - math.log(256)) < 0.2
    assert last < 0.1
    drawn = continue_text(trainer.model, b"abcab", 6, generator=torch.Generator().manual_seed(0))
    assert bytes(drawn) == b"cabcab"


def test_no_byte_sees_those_after_it():
    model = make_model().double()
    tokens = torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = torch.randint(256, (5,))
    assert torch.equal(model(tokens)[:, :7], model(changed)[:, :7])
    with pytest.raises(ValueError, match="at most 16 fit the context, not 17"):
        model(torch.zeros(1, 17, dtype=torch.int64))


def test_a_users_model_and_optimizer():
    model = nn.Embedding(10, 10)
    trainer = LMTrainer(model, optimizer=torch.optim.SGD(model.parameters(), 1.0), clip=1e9)
    before = model.weight.detach().clone()
    step = trainer.step(torch.tensor([[1, 2]]))
    by_hand = before.clone().requires_grad_()
    loss = nn.functional.cross_entropy(by_hand[[1]], torch.tensor([2]))
    loss.backward()
    torch.testing.assert_close(step.loss, loss.detach())
    torch.testing.assert_close(step.gradient_norm, by_hand.grad.norm())
    torch.testing.assert_close(model.weight.detach(), before - by_hand.grad)


class BigramTable(nn.Module):
    """Says what the bigram model says, in the form of a transformer."""

    def __init__(self, log_probabilities):
        super().__init__()
        self.table = nn.Parameter(log_probabilities)

    def forward(self, tokens):
        return self.table[tokens]


def bigram_by_counting(train, a, b):
    followers = [y for x, y in pairwise(train) if x == a]
    unigram = (train.count(b) + 1) / (len(train) + 256)
    kinds = len(set(followers)) or 1
    return (followers.count(b) + kinds * unigram) / (len(followers) + kinds)


def test_bigram_is_its_formula_and_a_distribution():
    train, held_out = b"abracadabra, said the cobra", b"abba cad"
    nats = [-math.log(bigram_by_counting(train, *pair)) for pair in pairwise(held_out)]
    expected = math.exp(sum(nats) / len(nats))
    got = text.bigram_perplexity(torch.tensor(list(train)), torch.tensor(list(held_out)))
    assert got == pytest.approx(expected, rel=1e-12)
    assert sum(bigram_by_counting(train, ord("a"), b) for b in range(256)) == pytest.approx(1)


@pytest.mark.parametrize("context", [2, 3, 8, 9])
@pytest.mark.parametrize("length", [10, 31, 64, 65])
def test_every_byte_is_judged_once(context, length):
    """A transformer that says what a bigram table says has the table's perplexity, whatever the
    windows."""
    torch.manual_seed(0)
    table = torch.randn(256, 256, dtype=torch.float64).log_softmax(1)
    held_out = torch.randint(256, (length,))
    expected = math.exp(-table[held_out[:-1], held_out[1:]].mean())
    got = text.model_perplexity(BigramTable(table), held_out, context, batch_size=3)
    assert got == pytest.approx(expected, rel=1e-12)


def test_windows_stay_inside_and_meet_every_byte():
    tokens, context = torch.arange(100), 7
    count = text.window_count(tokens, context)
    seen = set()
    for shift in range(context):
        cut = text.windows(tokens, torch.arange(count), context, shift)
        assert cut.shape == (count, context + 1)
        assert (cut[:, 1:] == cut[:, :-1] + 1).all()
        seen |= set(cut.flatten().tolist())
    # All that a window may miss is at the end, less than one context.
    assert seen >= set(range(100 - context))


def test_text_of_a_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"0123456789" * 10)
    loaded = text.load_text(str(file), context=4)
    assert bytes(loaded.train.tolist() + loaded.held_out.tolist()) == file.read_bytes()
    assert len(loaded.held_out) == 10
    with pytest.raises(
        TrainError, match="has 100 bytes: with a context of 16 it takes at least 170"
    ):
        text.load_text(str(file), context=16)
    with pytest.raises(TrainError, match=r"could not read --data .*nowhere: No such file"):
        text.load_text(str(tmp_path / "nowhere"), context=4)
