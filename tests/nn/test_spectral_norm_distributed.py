"""Models normalised as a whole, trained on two ranks by DDP and by FSDP2."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

SCRIPT = Path(__file__).with_name("spectral_norm_on_two_ranks.py")
LAYERS, FORWARDS = 4, 2


def script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the two ranks wrote."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch was built without gloo")
    if torch.__version__ < "2.7":
        pytest.skip("torch 2.6 runs no FSDP2 on the CPU")
    folder = tmp_path_factory.mktemp("ranks")
    result = subprocess.run(
        [sys.executable, SCRIPT, folder],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("mode", ["ddp_broadcast", "ddp", "ddp_r1", "fsdp", "fsdp_r1"])
def test_two_ranks_train_as_one(mode, folder):
    """Weights, u and v after some steps of fused Adam. Sharded layer by layer, each is normalised
    after its own all-gather."""
    whole = script()
    model, images = whole.model_and_images()
    expected = whole.train(whole.Loss(model, penalty=mode.endswith("r1")), images)
    assert expected["calls"] == FORWARDS * whole.STEPS
    assert not torch.equal(
        whole.model_and_images()[0].state_dict()["logit.parametrizations.weight.0._v"],
        expected["state"]["model.logit.parametrizations.weight.0._v"],
    )
    for rank in range(whole.RANKS):
        got = torch.load(folder / f"{mode}{rank}.pt")
        torch.testing.assert_close(got["state"], expected["state"], rtol=1e-10, atol=1e-12)
        calls = LAYERS * expected["calls"] if mode == "fsdp" else expected["calls"]
        assert got["calls"] == calls
