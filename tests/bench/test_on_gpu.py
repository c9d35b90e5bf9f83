"""benchmarks/on_gpu.py, as far as it goes without a GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genkern.bench import machine
from genkern.bench.measure import peak_device_memory
from genkern.bench.workload import numbers

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "on_gpu.py"
pytestmark = pytest.mark.skipif(
    not SCRIPT.exists(), reason="benchmarks/ does not lie beside tests/"
)


@pytest.fixture
def on_gpu(monkeypatch):
    spec = importlib.util.spec_from_file_location("on_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_gpu", module)
    spec.loader.exec_module(module)
    return module


def step(on_gpu, code, **options):
    return on_gpu.Step("tests", "a step", [sys.executable, "-c", code], **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_it_says_so(on_gpu, capsys, tmp_path):
    assert on_gpu.main(["--out", str(tmp_path / "report.md")]) == 1
    assert capsys.readouterr().err == (
        "on_gpu: torch sees no GPU on this machine, so nothing was run\n"
    )
    assert not (tmp_path / "report.md").exists()


def test_dry_run_shows_every_step(capsys, on_gpu):
    assert on_gpu.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(on_gpu.steps()) == 9
    for tool in on_gpu.SANITIZERS:
        assert any(f"--tool {tool}" in line and "tests/cuda" in line for line in lines)
    for backend in on_gpu.BACKENDS:
        assert any(f"GENKERN_BACKEND={backend}" in line for line in lines)


def test_the_folders_of_the_steps_exist(on_gpu):
    named = {word for one in on_gpu.steps() for word in one.command if word.startswith("../")}
    assert named and all((on_gpu.HERE / name).is_dir() for name in named)


def test_a_sanitizer_that_is_not_there_is_not_run(on_gpu, monkeypatch):
    monkeypatch.setattr(on_gpu, "find_sanitizer", lambda: None)
    sanitizers = [one for one in on_gpu.steps() if one.what == "sanitizer"]
    assert len(sanitizers) == 4
    for one in sanitizers:
        assert on_gpu.run(one).result.startswith("not run: compute-sanitizer is neither on PATH")


def test_outcomes(on_gpu):
    good = on_gpu.run(step(on_gpu, "print('fine')"))
    assert (good.result, good.output) == ("passed", "fine\n")
    bad = on_gpu.run(step(on_gpu, "print('so'); raise SystemExit(3)"))
    assert (bad.result, bad.output) == ("failed: exit status 3", "so\n")
    slow = on_gpu.run(step(on_gpu, "import time; time.sleep(60)", minutes=0.02))
    assert slow.result == "failed: not done after 0.02 minutes"
    missing = on_gpu.Step("tests", "none", ["no-such-program"])
    assert on_gpu.run(missing).result.startswith("failed: ")
    seen = on_gpu.run(step(on_gpu, "import os; print(os.environ['X'])", environment={"X": "7"}))
    assert seen.output == "7\n"


def fake_gpu(on_gpu, monkeypatch, steps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(on_gpu, "machine", lambda: ["device: an imagined one", "driver: 1"])
    monkeypatch.setattr(on_gpu, "steps", lambda quick: steps)


def test_a_failed_step_is_recorded_and_the_rest_goes_on(on_gpu, monkeypatch, tmp_path, capsys):
    steps = [
        step(on_gpu, "raise SystemExit(3)"),
        on_gpu.Step("sanitizer", "not there", ["x"], needs="nobody has it"),
        step(on_gpu, "print('a table')", environment={"GENKERN_BACKEND": "cuda"}),
        step(on_gpu, "raise SystemExit(1)", environment={"GENKERN_BACKEND": "triton"}),
    ]
    fake_gpu(on_gpu, monkeypatch, steps)
    out = tmp_path / "report.md"
    assert on_gpu.main(["--out", str(out)]) == 1
    text = out.read_text()
    assert "- device: an imagined one\n- driver: 1\n" in text
    assert "- cuda: **measured**\n- triton: **failed**\n" in text
    assert "| a step | failed: exit status 3 |" in text
    assert "| not there | not run: nobody has it | 0 |" in text
    assert "```\na table\n```" in text
    assert capsys.readouterr().out.count("…") == 4


def test_all_passed(on_gpu, monkeypatch, tmp_path):
    fake_gpu(on_gpu, monkeypatch, [step(on_gpu, "pass")])
    out = tmp_path / "report.md"
    assert on_gpu.main(["--out", str(out)]) == 0
    assert "- cuda: **not run**" in out.read_text()  # no benchmark among the steps


# ---- The benchmark on a device ------------------------------------------------------------------


def test_bench_refuses_a_device_that_is_not_there(tmp_path):
    def refused(*options):
        command = [sys.executable, "-m", "genkern", "bench", "hinge D 64", *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 1
        return done.stderr

    assert "--device must be cpu or cuda, not 'tpu'" in refused("--device", "tpu")
    if not torch.cuda.is_available():
        assert "--device cuda: torch sees no GPU on this machine" in refused("--device", "cuda")


def test_values_are_drawn_on_the_cpu_and_lie_on_the_device():
    torch.manual_seed(0)
    here = numbers(3, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.device("meta"):
        there = numbers(3, dtype=torch.float32)
    assert there.device.type == "meta" and there.requires_grad and here.device.type == "cpu"


def test_memory_and_time_of_a_device(monkeypatch):
    """With torch's functions of the GPU replaced by what writes down that they were called."""
    asked = []
    fake = SimpleNamespace(
        synchronize=lambda *device: asked.append("synchronize"),
        reset_peak_memory_stats=lambda: asked.append("reset"),
        memory_allocated=lambda: 100,
        max_memory_allocated=lambda: 164,
    )
    for name, function in vars(fake).items():
        monkeypatch.setattr(torch.cuda, name, function)

    class OnCPU:
        def prepare(self, implementation, device):
            assert device == "cuda"
            return lambda: asked.append("step")

    assert peak_device_memory(OnCPU(), "genkern") == 64
    assert asked == ["step", "synchronize", "reset", "step", "synchronize"]
    asked.clear()
    machine.median_seconds(lambda: asked.append("call"), 2, "cuda")
    assert asked == ["call", "synchronize"] * 2
