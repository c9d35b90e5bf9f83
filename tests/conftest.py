"""What all tests share."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genkern._native import native

# Without a GPU Triton's kernels run in its interpreter, which has to be known before anything
# imports Triton. Tests that compile kernels do so in processes of their own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def _load(name):
    """A module beside this file that is no test and that tests import by name."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


_load("attention_errors")
_load("attention_passes")


@pytest.fixture(scope="session", autouse=True)
def away_from_the_source_tree(tmp_path_factory):
    """Python puts the current folder on the path of processes that tests start: there must be no
    unbuilt genkern in it."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("away"))
    yield
    os.chdir(before)


@pytest.fixture(params=native.cpu_levels())
def cpu_level(request):
    """Runs the test once on each instruction-set level that this build and this machine have."""
    before = native.cpu_level()
    assert native.set_cpu_level(request.param)
    yield request.param
    native.set_cpu_level(before)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory from torch's empty functions arrives full of NaN: a kernel that leaves an element
    unwritten is then seen."""

    def poison(allocate):
        def allocate_nan(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_nan

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2])
def threads(request):
    """Runs the test with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def python():
    """Runs code in a Python of its own, with environment variables by keyword."""

    def run(code, **environment):
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def at_level():
    """Chooses a level by its name; the one from before comes back."""
    before = native.cpu_level()

    def choose(level):
        assert native.set_cpu_level(level)

    yield choose
    native.set_cpu_level(before)
