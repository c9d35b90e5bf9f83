"""`genkern prove`: its table, what it says of failures, and of what is missing."""

import dataclasses

import pytest
import torch

import genkern
from genkern import cli
from genkern.backend import has_cuda
from genkern.bench.workload import largest_error
from genkern.prove import barrier, check, command, workloads
from genkern.ptx import build, shipped

needs_cuda = pytest.mark.skipif(
    not has_cuda(), reason="no CUDA kernels: GENKERN_CUDA=1 pip install '.[test,nvcc]' builds them"
)


@pytest.fixture
def few(monkeypatch):
    """Few workloads instead of the quick ones: few(workload, …)."""

    def choose(*chosen):
        monkeypatch.setattr(workloads, "quick", lambda: list(chosen))

    choose(workloads.spectral_norm(torch.float32), workloads.feature_matching(torch.float32))
    return choose


def prove(*arguments):
    """In this process, which knows the workloads of `few`."""
    return cli.main(["prove", "--jobs", "1", *arguments])


@pytest.mark.parametrize(
    "chosen", ["quick", pytest.param("everything", marks=pytest.mark.exhaustive)]
)
def test_ours_means_what_eager_does(chosen):
    """In fp64, on the reference: the two sides of every comparison compute the same."""
    with genkern.use_backend("reference"):
        for workload in getattr(workloads, chosen)():
            workload = dataclasses.replace(workload, dtype=torch.float64)
            got, exact = workload.prepare("genkern")(), workload.prepare("exact")()
            # Rounding alone is 1e-15; once, not to be had again, attention differed by 7.5e-10.
            assert largest_error(got, exact) < 1e-8, workload.name


def test_names_tell_workloads_apart():
    names = [workload.name for workload in workloads.everything()]
    assert len(set(names)) == len(names)


def test_an_error_is_not_hidden_by_a_later_one():
    exact = torch.ones(2), torch.ones(2)
    assert largest_error((torch.ones(2), torch.tensor([1.0, 1.5])), exact) == 0.5
    nan = largest_error((torch.tensor([1.0, float("nan")]), torch.zeros(2)), exact)
    assert nan != nan


# ---- The command --------------------------------------------------------------------------------


@needs_cuda
def test_the_table(few, capsys):
    assert prove("--backend", "cuda") == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("cuda ")]
    assert [row.split()[1:3] for row in rows] == [
        ["spectral_norm", "float32"],
        ["feature_matching", "float32"],
    ]
    assert all(row.count("✓") == 2 for row in rows)
    assert f"of the {len(shipped.kernels())} kernels" in out
    assert "caught ✓" in out
    assert out.endswith("Everything agrees with fp64, and no race was found.\n")


@needs_cuda
def test_a_wrong_result_fails(few, capsys):
    right = workloads.feature_matching(torch.float32)

    def build(implementation, dtype):
        step = right.build(implementation, dtype)
        factor = 1.001 if implementation == "genkern" else 1.0
        return lambda: [x * factor for x in step()]

    few(workloads.spectral_norm(torch.float32), dataclasses.replace(right, build=build))
    assert prove("--backend", "cuda") == 1
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "feature_matching" in line)
    assert "1.0e-03" in row and "✗" in row
    assert out.endswith("1 of these failed.\n")


@needs_cuda
def test_another_backend_is_no_proof():
    """Nothing of ours is launched: plain torch's second derivatives."""
    right = workloads.feature_matching(torch.float32)

    def build(implementation, dtype):
        step = right.build(implementation, dtype)

        def elsewhere():
            with genkern.use_backend("cpu"):
                return step()

        return elsewhere if implementation == "genkern" else step

    outcome = check.execute(dataclasses.replace(right, build=build), "cuda", schedule=0)
    assert not outcome.holds and "cpu (asked for)" in outcome.elsewhere


@needs_cuda
def test_unwritten_memory_is_seen(monkeypatch):
    """A kernel that is not launched leaves NaN."""
    monkeypatch.setattr("genkern.ops.spectral_norm.cuda._run", lambda *arguments: None)
    outcome = check.execute(workloads.spectral_norm(torch.float32), "cuda", schedule=0)
    assert outcome.fault is None and outcome.error != outcome.error and not outcome.holds


@needs_cuda
def test_a_barrier_that_nobody_misses_fails(few, monkeypatch, capsys):
    monkeypatch.setattr(
        barrier, "without_barrier", lambda text, kernel: (text, 7)
    )  # it was never taken away
    assert prove("--backend", "cuda") == 1
    assert "✗ nothing was noticed" in capsys.readouterr().out


def test_taking_a_barrier_away():
    text = ".entry first(\n{\n\tret;\n}\n.entry second(\n{\n\tbar.sync \t0;\n\tbar.sync \t0;\n}\n"
    assert barrier.without_barrier(text, "first") == (text, None)
    without, line = barrier.without_barrier(text, "second")
    assert line == 8 and without.count("bar.sync") == 1
    assert without.splitlines()[7].strip() == "" and without.count("\n") == text.count("\n")


# ---- What is missing ----------------------------------------------------------------------------


def test_without_cuda(monkeypatch, capsys):
    monkeypatch.setattr("genkern.backend.has_cuda", lambda: False)
    assert prove("--backend", "cuda") == 1
    assert "cuda: not executed: the CUDA kernels were not built" in capsys.readouterr().out


def test_without_a_compiler(monkeypatch, capsys):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    build.compiler.cache_clear()
    assert prove() == 1
    build.compiler.cache_clear()
    assert capsys.readouterr().out.count("needs a C++ compiler") == len(command.BACKENDS)


def test_without_triton(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert prove("--backend", "triton") == 1
    assert "triton: not executed: TRITON_INTERPRET=1 is set" in capsys.readouterr().out
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr("genkern.ops._triton.problem", lambda: "Triton is not installed")
    assert prove("--backend", "triton") == 1
    assert "triton: not executed: Triton is not installed" in capsys.readouterr().out
