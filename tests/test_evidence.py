"""What the README and `genkern info` say of the GPU kernels is what the tests left."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from genkern import evidence, info

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evidence_script", ROOT / "tests" / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README.md beside tests/")
def test_the_readme_says_what_was_found(script):
    text = (ROOT / "README.md").read_text()
    assert script.with_table(text, evidence.table(evidence.load(), info.OPS)) == text


def test_of_every_op_with_a_kernel_something_is_told():
    told = evidence.load()["backends"]
    for backend in evidence.BACKENDS:
        assert set(told[backend]) == {op for op, of in info.OPS.items() if backend in of.KERNELS}


def test_info_shows_it():
    text = info.render(info.gather())
    for backend, ops in evidence.load()["backends"].items():
        for op, of_op in ops.items():
            assert any(
                line.split()[:2] == [backend, op] and line.endswith(evidence.told(of_op))
                for line in text.splitlines()
            )


def test_words():
    passes = {"forward": ["fp32", "bf16"], "backward": ["fp32", "bf16"], "jvp": ["fp32"]}
    assert evidence.told({"executed": passes, "compiled": ["sm_80", "sm_90"]}) == (
        "executed: forward, backward in fp32, bf16, jvp in fp32; compiled: sm_80, sm_90"
    )
    assert evidence.told({"measured": {"jvp": ["bf16"]}, "executed": {}, "compiled": []}) == (
        "measured: jvp in bf16"
    )
    assert evidence.told({"executed": {}, "compiled": ["sm_80"]}) == "compiled: sm_80"
    assert evidence.told({"executed": {}, "compiled": []}) == "not run"
    found = {"backends": {"cuda": {"losses": {"executed": {}, "compiled": []}}}}
    assert evidence.table(found, ["losses"]).endswith("| losses | not run | no kernel |")


def test_the_table_stands_between_its_marks(script):
    text = f"before\n{script.BEGIN}\nold\n{script.END}\nafter"
    assert script.with_table(text, "new") == f"before\n{script.BEGIN}\nnew\n{script.END}\nafter"


# ---- What counts --------------------------------------------------------------------------------


def test_an_op_counts_where_a_passed_test_executed_it_and_no_failed_one_did(script):
    losses, kl = ("cuda", "losses"), ("cuda", "gaussian_kl")
    executed = {(*losses, "forward", "float32"), (*losses, "forward", "bfloat16")}
    executed |= {(*losses, "backward", "float32"), (*kl, "forward", "float32")}
    failed = {(*losses, "forward", "bfloat16"), (*kl, "forward", "float32")}
    timed = {(*losses, "backward", "bfloat16")}
    found = script.gathered(executed, failed, {losses: {"sm_120", "sm_80"}}, timed)["cuda"]
    assert found["losses"] == {
        "measured": {"backward": ["bf16"]},
        "executed": {"forward": ["fp32"], "backward": ["fp32"]},
        "compiled": ["sm_80", "sm_120"],
    }
    assert found["gaussian_kl"] == {"measured": {}, "executed": {}, "compiled": []}


def test_only_what_the_executor_took_is_executed(script, monkeypatch):
    """A choice of a backend is no execution: the launch is."""
    from genkern import backend, ptx

    monkeypatch.setattr(ptx.Module, "launch", lambda module, *args: "result")
    monkeypatch.setattr(backend, "choose", lambda op, tensor, kernels: kernels[0])
    with script.Watch().watching() as seen:
        backend.choose("attention", torch.zeros(1), ("cuda",))
        assert not seen
        ptx.Module.launch(None)
        backend.record("attention.backward", "cuda", "the forward ran there")
        ptx.Module.launch(None)
        backend.choose("adversarial_loss", torch.zeros(1).bfloat16(), ("cpu",))
        ptx.Module.launch(None)
    assert seen == {
        ("cuda", "attention", "forward", "float32"),
        ("cuda", "attention", "backward", "float32"),
    }


def test_the_plugin(script, tmp_path, pytestconfig, monkeypatch):
    """A run of its own over small tests: passed, failed, skipped, and one that compiles."""
    monkeypatch.setattr("genkern.ptx.Module.launch", lambda module: None)
    folder = tmp_path / "tests" / "cuda"
    folder.mkdir(parents=True)
    (folder / "test_small.py").write_text(
        """
import pytest, torch
from genkern import backend, ptx

def run(dtype):
    backend.choose("losses", torch.zeros(1, dtype=dtype), ("cpu", "cuda"))
    backend.record("losses", "cuda", "asked for")
    ptx.Module.launch(None)

def test_passes(): run(torch.float32)
def test_fails(): run(torch.float64); assert False
def test_skips(): run(torch.bfloat16); pytest.skip("no")
def test_compiles(record_property): record_property("compiled", ["losses", "sm_80"])
@pytest.mark.exhaustive
def test_left_out(): run(torch.float16)
"""
    )
    plugin = script.Evidence()
    config = str(Path(pytestconfig.inipath))
    assert pytest.main(["-q", "-c", config, "-m", "", str(folder)], plugins=[plugin]) == 1
    assert plugin.executed == {("cuda", "losses", "forward", "float32")}
    assert plugin.failed == {("cuda", "losses", "forward", "float64")}
    assert plugin.compiled == {("cuda", "losses"): {"sm_80"}}


def test_the_file_is_json():
    assert set(json.loads(evidence.FILE.read_text())) == {"versions", "device", "backends"}


def test_what_a_gpu_measured_is_read_from_its_report(script, monkeypatch, tmp_path):
    def result(name, exact_enough=True):
        return {"name": name, "exact_enough": exact_enough}

    report = {
        "device": "an imagined one",
        "backends": {
            "cuda": [result("attention 1×1×8×8 bfloat16"), result("hinge D 64 float32", False)],
            "triton": [
                result("attention jvp 1×1×8×8 causal float32"),
                result("lsgan D 64 float32"),
            ],
        },
    }
    monkeypatch.setattr(script, "MEASURED", tmp_path / "measured.json")
    assert script.measured() == (None, set())
    script.MEASURED.write_text(json.dumps(report))
    attention = "attention"
    assert script.measured() == (
        "an imagined one",
        {
            ("cuda", attention, "forward", "bfloat16"),
            ("cuda", attention, "backward", "bfloat16"),
            ("triton", attention, "jvp", "float32"),
        },
    )
