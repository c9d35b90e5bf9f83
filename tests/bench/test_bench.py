"""The measuring itself: the table's parts, its error column, its memory column."""

import json
import subprocess
import sys

import pytest
import torch

from genkern.bench import measure as measuring
from genkern.bench.measure import Result, check, interleave, peak_memory
from genkern.bench.workloads import Workload, all_workloads


def by_name(start):
    return next(w for w in all_workloads() if w.name.startswith(start))


def test_names_are_unique_and_some_are_quick():
    names = [w.name for w in all_workloads()]
    assert len(set(names)) == len(names)
    assert {w.op for w in all_workloads() if w.quick} >= {"attention", "spectral_norm", "hinge D"}


def is_large(workload):
    return "4096" in workload.shape or "8192" in workload.shape or workload.shape.endswith("-128")


SMALL = [w for w in all_workloads() if not is_large(w)]
LARGE = [w for w in all_workloads() if is_large(w)]


@pytest.mark.parametrize("workload", SMALL, ids=lambda w: w.name)
def test_ours_is_exact_enough(workload):
    result = Result(workload.name)
    check(workload, result)
    assert result.exact_enough, (result.error, result.eager_error)


@pytest.mark.exhaustive
@pytest.mark.parametrize("workload", LARGE, ids=lambda w: w.name)
def test_ours_is_exact_enough_at_length(workload):
    result = Result(workload.name)
    check(workload, result)
    assert result.exact_enough, (result.error, result.eager_error)


def test_a_wrong_kernel_is_seen():
    honest = by_name("hinge D 64")

    def build(implementation, dtype):
        step = honest.build(implementation, dtype)

        def off():
            loss, *grads = step()
            return loss * 1.001, *grads

        return off if implementation == "genkern" else step

    result = Result("wrong")
    check(Workload("hinge D", "64", torch.float32, build), result)
    assert not result.exact_enough and result.error > 1e-4


def test_interleaved():
    order = []
    steps = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = interleave(steps, 0.0, least=3)
    assert order == ["a", "b"] * 3 and [len(t) for t in times.values()] == [3, 3]


def test_memory_of_attention_is_not_quadratic():
    workload = by_name("attention 1×1×4096")
    one_matrix = 4096 * 4096 * 4
    assert peak_memory(workload, "eager") > 2 * one_matrix
    assert peak_memory(workload, "genkern") < 0.5 * one_matrix


def test_a_dead_process_is_an_error(monkeypatch):
    monkeypatch.setattr(measuring, "_measure_peak", _die)
    with pytest.raises(OSError, match="died"):
        peak_memory(by_name("hinge D 64"), "eager")


def _die(*_):
    raise SystemExit(3)


def test_command(tmp_path):
    out = tmp_path / "bench.json"
    command = [
        sys.executable,
        "-m",
        "genkern",
        "bench",
        "hinge D 64",
        "--quick",
        "--json",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| hinge D | 64 | float32 |" in done.stdout and "GEMM fp32" in done.stdout
    (result,) = json.loads(out.read_text())["results"]
    assert result["exact_enough"] and result["median"]["genkern"] > 0


def test_command_without_a_match():
    command = [sys.executable, "-m", "genkern", "bench", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "genkern bench: no workload's name begins with 'nothing'\n"
