"""Checkpoints come back exactly, and are whole whatever happens while they are written."""

import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from genkern.train import checkpoint
from genkern.train.errors import TrainError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.safetensors"


def test_comes_back_exactly(path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.0, 0.9))
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    tied = torch.randn(4)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "tied": [tied, tied, tied[1:3]],
        "strided": torch.randn(3, 4).t(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 5),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "random": torch.get_rng_state(),
        "plain": {"name": "ünï", "rate": 0.1, "none": None, "flag": True, "list": [1, [2]]},
        1: "a key that is a number",
    }
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    optimizer.load_state_dict(loaded["optimizer"])
    assert loaded["plain"] == state["plain"]
    assert loaded[1] == state[1]
    for name in ("strided", "scalar", "empty", "half", "random"):
        assert loaded[name].dtype == state[name].dtype
        assert torch.equal(loaded[name], state[name])
    assert all(map(torch.equal, loaded["tied"], state["tied"]))
    assert torch.equal(
        loaded["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"]
    )


def test_missing(path):
    with pytest.raises(TrainError, match=r"there is no checkpoint .*checkpoint\.safetensors"):
        checkpoint.load(path)


def test_truncated(path):
    checkpoint.save(path, {"w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(TrainError, match="damaged"):
        checkpoint.load(path)


def test_one_flipped_bit(path):
    checkpoint.save(path, {"w": torch.ones(100)})
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    with pytest.raises(TrainError, match="do not match their checksum"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100])
def test_not_safetensors(path, content):
    path.write_bytes(content)
    with pytest.raises(TrainError, match="damaged or not a safetensors file"):
        checkpoint.load(path)


def test_somebody_elses_safetensors(path):
    safetensors.torch.save_file({"w": torch.ones(3)}, path)
    with pytest.raises(TrainError, match="not one that genkern train wrote"):
        checkpoint.load(path)


def test_a_disk_that_refuses_leaves_the_old_one(path):
    checkpoint.save(path, {"step": 1, "w": torch.ones(10)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            TrainError, match=r"could not write .*checkpoint\.safetensors: File too"
        ):
            checkpoint.save(path, {"step": 2, "w": torch.ones(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.load(path)["step"] == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


SAVE_FOREVER = """
import sys, torch
from genkern.train import checkpoint
step = 0
while True:
    checkpoint.save(sys.argv[1], {"step": step, "w": [torch.full((200_000,), step) for _ in "abc"]})
    print(step, flush=True)
    step += 1
"""


def test_kill_while_saving(path):
    """kill -9 at random moments of a process that does nothing but save: the file that is left is
    one whole checkpoint, and none older than the last that was reported."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, path], stdout=subprocess.PIPE, text=True
    )
    reported = int(process.stdout.readline())
    try:
        for _ in range(60):
            # A stop freezes the writer wherever it is, as a kill would.
            time.sleep(random.uniform(0, 0.02))
            process.send_signal(signal.SIGSTOP)
            state = checkpoint.load(path)
            assert all((w == state["step"]).all() for w in state["w"])
            process.send_signal(signal.SIGCONT)
        process.kill()
        for line in process.stdout:
            reported = int(line)
    finally:
        process.kill()
        process.wait()
    state = checkpoint.load(path)
    assert state["step"] >= reported > 0
    assert all((w == state["step"]).all() for w in state["w"])
