"""Models of genkern's attention modules on two ranks, and recomputed in the backward."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import genkern

SCRIPT = Path(__file__).with_name("attention_on_two_ranks.py")
MODES = {"ddp": False, "ddp_r1": True, "fsdp": False, "fsdp_r1": True}


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_have_the_gradients_of_one(mode, script, ranks):
    model, images = script.model_and_images()
    loss = script.Loss(model, penalty=MODES[mode])
    loss(images).backward()
    expected = script.gradients(loss)
    assert all(grad.abs().max() > 0 for grad in expected.values())
    for rank in range(script.RANKS):
        got = torch.load(ranks / f"{mode}{rank}.pt")
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(use_reentrant):
    layer = genkern.nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).double()
    x = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)

    def attend(x):
        return layer(x, x, x, need_weights=False)[0]

    results = []
    for run in (attend, lambda x: checkpoint(attend, x, use_reentrant=use_reentrant)):
        torch.manual_seed(4)
        layer.zero_grad()
        x.grad = None
        with genkern.explain() as log:
            out = run(x)
            out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in layer.parameters())])
    assert [(c.op, c.backend) for c in log] == [
        ("attention", "cpu"),
        ("attention", "cpu"),
        ("attention.backward", "cpu"),
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_checkpointing_under_r1(script):
    """The modules of the two ranks, each recomputed, twice differentiated."""
    model, images = script.model_and_images()
    loss = script.Loss(model, penalty=True)
    loss(images).backward()
    expected = script.gradients(loss)
    model.zero_grad()
    model.forward = partial(checkpoint, model.forward, use_reentrant=False)
    with genkern.explain() as log:
        loss(images).backward()
    assert [c.op for c in log].count("attention") == 3 * 3  # and again for each backward
    torch.testing.assert_close(script.gradients(loss), expected, rtol=1e-10, atol=1e-12)
