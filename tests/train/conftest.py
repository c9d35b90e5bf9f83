"""What the training tests share."""

import argparse

import pytest
import torch

from genkern.train.commands import add_sample_parser, add_train_parser


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
        parser = argparse.ArgumentParser(prog="genkern")
        subparsers = parser.add_subparsers()
        add_train_parser(subparsers)
        add_sample_parser(subparsers)
        arguments = parser.parse_args([str(word) for word in words])
        code = arguments.func(arguments)
        streams = capsys.readouterr()
        return code, streams.out + streams.err

    return run
