"""The built package: levels, dispatch, threads, and what a broken installation says."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import genkern
from genkern import _native, info, losses
from genkern._native import native
from genkern.backend import has_cuda
from genkern.ops.differences import cuda

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# Those of common/ are compiled once, for the baseline.
KERNELS = sorted(path for path in CSRC.glob("*/*.cpp") if path.parent.name != "common")
needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="csrc/ does not lie beside tests/")


# ---- Levels -------------------------------------------------------------------------------------


def test_best_level_is_the_default(python):
    answer = python("from genkern._native import native as n; print(n.cpu_level(), n.cpu_levels())")
    level, _, levels = answer.stdout.strip().partition(" ")
    assert levels == str(native.cpu_levels()) and level == native.cpu_levels()[-1]


def test_level_from_the_environment(cpu_level, python):
    code = "from genkern._native import native as n; print(n.cpu_level())"
    answer = python(code, GENKERN_CPU_ISA=cpu_level)
    assert answer.stdout.strip() == cpu_level


def test_wrong_level_in_the_environment(python):
    answer = python("import genkern", GENKERN_CPU_ISA="sse9")
    assert "GENKERN_CPU_ISA must be one of portable, avx2, avx512, amx, not 'sse9'" in answer.stderr


def test_a_level_that_the_machine_lacks_is_refused(monkeypatch):
    class Old:
        set_cpu_level = staticmethod(lambda name: False)
        cpu_levels = staticmethod(lambda: ["portable"])

    monkeypatch.setenv("GENKERN_CPU_ISA", "avx512")
    with pytest.raises(ValueError, match="asks for 'avx512', but this machine and this build have"):
        _native._choose_level(Old)
    assert not native.set_cpu_level("nonsense")


@needs_sources
@pytest.mark.parametrize("source", KERNELS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_no_function_leaks_out_of_its_level(source, tmp_path):
    """An inline function of a wide level that another level could link to would crash old machines:
    unoptimised, every one of them is visible."""
    compiler, nm = os.environ.get("CXX", "c++"), shutil.which("nm")
    if not shutil.which(compiler) or not nm:
        pytest.skip(f"needs {compiler} and nm")
    out = tmp_path / "kernel.o"
    flags = ["-std=c++17", "-O0", "-fPIC", "-DGK_LEVEL=wide", "-DGK_VECTOR_BYTES=16", "-c"]
    flags += ["-fno-exceptions"]  # as setup.py
    subprocess.run([compiler, *flags, str(source), "-o", str(out)], check=True, timeout=300)
    listing = subprocess.run([nm, "-C", "--defined-only", str(out)], capture_output=True, text=True)
    shared = re.findall(r"^\S* [WVu] (.*)$", listing.stdout, re.MULTILINE)
    leaks = [name for name in shared if "genkern::wide::" not in name]
    assert not leaks


@needs_sources
def test_no_torch_in_the_sources():
    for path in CSRC.rglob("*"):
        if path.is_file():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path


# ---- Import -------------------------------------------------------------------------------------


@needs_sources
def test_unbuilt_source_tree_says_what_to_do(tmp_path, python):
    (tmp_path / "csrc").mkdir()
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(genkern.__file__).parent, tmp_path / "genkern", ignore=ignored)
    answer = python("import genkern", PYTHONPATH=str(tmp_path))
    assert answer.returncode
    last = answer.stderr.strip().splitlines()[-1]
    assert re.search("source tree", last) and "pip install -e ." in last


# ---- Threads ------------------------------------------------------------------------------------


def test_a_forked_child_can_run_kernels(python):
    """OpenMP hangs in a forked child, so at one thread no parallel region may be opened."""
    code = """
import os, torch, genkern
torch.set_num_threads(2)
x = torch.randn(1 << 20)
before = genkern.losses.hinge.d(x, x)
child = os.fork()
if not child:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(genkern.losses.hinge.d(x, x), before) else 7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code).stdout.strip() == "0"


def test_kernels_release_the_gil():
    x = torch.randn(1 << 24)
    span = {}

    def work():
        span["start"] = time.perf_counter()
        losses.nonsaturating.d(x, x)
        span["end"] = time.perf_counter()

    worker = threading.Thread(target=work)
    worker.start()
    ticks = []
    while worker.is_alive():
        ticks.append(time.perf_counter())
    inside = [t for t in ticks if span["start"] < t < span["end"]]
    longest_silence = max(b - a for a, b in itertools.pairwise(inside))
    assert longest_silence < 0.5 * (span["end"] - span["start"])


# ---- CUDA ---------------------------------------------------------------------------------------


def test_cuda_half_is_built_or_says_why_not():
    facts = info.gather()["cuda"]
    assert facts["built"] == has_cuda()
    assert facts["targets"] if facts["built"] else facts["why not"]


@pytest.mark.skipif(not has_cuda(), reason="built without CUDA: `genkern info` says why")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_a_launch_without_a_driver_is_an_error_not_a_crash():
    x = torch.zeros(4)
    pairs = [(x.data_ptr(), x.data_ptr(), 4, 1.0, 0, 0)]
    said = "differences_forward_cuda: the CUDA launch of .*genkern::cuda::.*kernel<float>.*: "
    with pytest.raises(RuntimeError, match=said):
        cuda.forward(0, pairs, x)


# ---- genkern info -------------------------------------------------------------------------------


def test_info_command():
    command = [sys.executable, "-m", "genkern", "info"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("genkern", torch.__version__, "portable", "openmp", "cuda", "triton", "attention"):
        assert word in text
    command.append("--json")
    facts = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(facts)["cpu"]["levels"]["portable"] == "usable"
    folders = {path.parent.name for path in Path(genkern.__file__).parent.glob("ops/*/op.py")}
    assert set(info.OPS) == folders


def test_info_names_what_is_missing(monkeypatch):
    built = json.loads(native.build_info)
    built["missing"] = {"amx": "the compiler refuses -mamx-tile", "cuda": "no nvcc"}
    built["levels"] = ["portable"]
    monkeypatch.setattr(info, "has_cuda", lambda: False)
    facts = info.gather() | {"cuda": info._cuda(built)}
    assert "cuda      not built: no nvcc" in info.render(facts)
    if "amx" not in native.cpu_levels():
        assert "refuses" in info._level_state("amx", built)
