"""The choice of a backend, and how it is told."""

import _thread
import threading
from types import SimpleNamespace

import pytest
import torch

import genkern
from genkern import backend, losses


def test_default_follows_the_device():
    with genkern.explain() as log:
        losses.nonsaturating.g(torch.ones(3))
    assert [str(choice) for choice in log] == ["adversarial_loss: cpu (the tensors' device)"]


def test_use_backend_nests_and_ends():
    with genkern.use_backend("reference"):
        with genkern.use_backend("cpu"), genkern.explain() as log:
            losses.nonsaturating.g(torch.ones(3))
        with genkern.explain() as outer:
            losses.nonsaturating.g(torch.ones(3))
    assert (log[0].backend, outer[0].backend) == ("cpu", "reference")
    with genkern.explain() as after:
        losses.nonsaturating.g(torch.ones(3))
    assert after[0].backend == "cpu"


def test_backward_runs_where_its_forward_ran():
    x = torch.randn(3, requires_grad=True)
    with genkern.use_backend("reference"):
        loss = losses.nonsaturating.g(x)
    with genkern.explain() as log:
        loss.backward()
    assert [choice.backend for choice in log] == ["reference"]


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="must be one of cpu, cuda, triton, reference, not 'gpu'"),
        genkern.use_backend("gpu"),
    ):
        pass


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backend_on_the_wrong_device(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with genkern.use_backend(name), pytest.raises(ValueError, match="needs tensors on a cuda dev"):
        losses.nonsaturating.g(torch.ones(3))


ASK = """
import torch, genkern
with genkern.explain() as log:
    genkern.losses.nonsaturating.g(torch.ones(3))
print(log[0].backend)
"""


def test_environment_sets_the_default(python):
    assert python(ASK, GENKERN_BACKEND="reference").stdout.strip() == "reference"
    assert python(ASK, GENKERN_BACKEND="cpu").stdout.strip() == "cpu"
    wrong = python(ASK, GENKERN_BACKEND="fast")
    assert wrong.returncode and "GENKERN_BACKEND must be one of" in wrong.stderr


def test_threads_that_python_did_not_start_see_what_was_asked_for_last():
    """Autograd's for GPUs, in which the backward of a compiled graph chooses."""
    tensor = SimpleNamespace(
        is_cpu=False, is_cuda=True, device=torch.device("cuda"), dtype=torch.float32
    )
    found, done = [], threading.Event()

    def foreign():
        found.append(backend.choose("an op", tensor, ("cuda", "triton")))
        done.set()

    with backend.use_backend("reference"):
        _thread.start_new_thread(foreign, ())
        assert done.wait(10)
    assert found == ["reference"]
