"""What the training tests share."""

import pytest
import torch

from genkern import cli


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `genkern …` in an empty folder: command("train", "--steps", 5) gives
    (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = cli.main([str(word) for word in words])
        streams = capsys.readouterr()
        return code, streams.out + streams.err

    return run
