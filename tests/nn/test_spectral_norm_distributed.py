"""Models normalised as a whole, trained on two ranks by DDP and by FSDP2."""

from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("spectral_norm_on_two_ranks.py")
LAYERS, FORWARDS = 4, 2


@pytest.mark.parametrize("mode", ["ddp_broadcast", "ddp", "ddp_r1", "fsdp", "fsdp_r1"])
def test_two_ranks_train_as_one(mode, script, ranks):
    """Weights, u and v after some steps of fused Adam. Sharded layer by layer, each is normalised
    after its own all-gather."""
    model, images = script.model_and_images()
    expected = script.train(script.Loss(model, penalty=mode.endswith("r1")), images)
    assert expected["calls"] == FORWARDS * script.STEPS
    assert not torch.equal(
        script.model_and_images()[0].state_dict()["logit.parametrizations.weight.0._v"],
        expected["state"]["model.logit.parametrizations.weight.0._v"],
    )
    for rank in range(script.RANKS):
        got = torch.load(ranks / f"{mode}{rank}.pt")
        torch.testing.assert_close(got["state"], expected["state"], rtol=1e-10, atol=1e-12)
        calls = LAYERS * expected["calls"] if mode == "fsdp" else expected["calls"]
        assert got["calls"] == calls
