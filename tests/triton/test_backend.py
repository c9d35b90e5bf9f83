"""Triton as a backend: when it is taken, what is said when it can't be, and what it is told."""

import sys

import pytest
import torch

import genkern
from genkern.backend import use_backend
from genkern.ops import _triton
from genkern.ops.attention.triton import configurations, tuning
from genkern.ops.attention.triton.call import near_rows


@pytest.fixture
def asked_anew():
    """What is known of Triton is forgotten before and after."""
    caches = _triton.version, _triton.problem
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def attend():
    x = torch.randn(1, 1, 3, 4)
    return genkern.attention(x, x, x)


def test_importing_genkern_imports_no_triton(python):
    code = "import sys, genkern; print('triton' in sys.modules)"
    assert python(code, TRITON_INTERPRET="0").stdout.strip() == "False"


in_the_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU Triton's kernels run there"
)


@in_the_interpreter
def test_backend_by_the_environment(python):
    code = """
import torch, genkern
x = torch.randn(1, 1, 3, 4)
with genkern.explain() as log:
    genkern.attention(x, x, x)
print(log[0].backend)
"""
    done = python(code, GENKERN_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.stdout.strip() == "triton", done.stderr
    done = python(code, GENKERN_BACKEND="triton", TRITON_INTERPRET="0")
    assert "needs tensors on a cuda device, or TRITON_INTERPRET=1 in the environment" in done.stderr
    done = python(code, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "cpu", done.stderr


def test_no_triton(monkeypatch, asked_anew):
    monkeypatch.setattr(_triton, "version", lambda: None)
    with use_backend("triton"), pytest.raises(RuntimeError, match="Triton is not installed"):
        attend()


def test_a_triton_too_old(monkeypatch, asked_anew):
    monkeypatch.setattr(_triton, "version", lambda: "3.2.0")
    sentence = r"Triton 3\.2\.0 is older than the kernels were tested with, 3\.4 to 3\.9"
    with use_backend("triton"), pytest.raises(RuntimeError, match=sentence):
        attend()
    monkeypatch.setattr(_triton, "version", lambda: "3.10.0+git0")
    _triton.problem.cache_clear()
    assert _triton.problem() is None  # newer ones are tried


def test_a_triton_that_does_not_import(monkeypatch, asked_anew):
    monkeypatch.setitem(sys.modules, "triton.language", None)
    with use_backend("triton"), pytest.raises(RuntimeError, match="cannot be imported"):
        attend()


@in_the_interpreter
def test_bf16_is_wrong_in_the_interpreter():
    x = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    with use_backend("triton"), genkern.explain() as log:
        genkern.attention(x, x, x)
        genkern.losses.hinge.g(x)
    assert {choice.backend for choice in log} == {"cpu"}
    assert "Triton's interpreter computes torch.bfloat16 wrongly" in log[0].reason


def test_fp64_needs_a_newer_one(monkeypatch):
    monkeypatch.setattr(_triton, "version", lambda: "3.4.0")
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    with use_backend("triton"), genkern.explain() as log:
        genkern.attention(x, x, x)
    assert "has no attention for torch.float64 with a Triton older than 3.5" in log[0].reason


@pytest.mark.parametrize(
    ("target", "like"),
    [
        *[("sm_80", "sm_80"), ("sm_86", "sm_120"), ("sm_89", "sm_120"), ("sm_90", "sm_90")],
        *[("sm_103", "sm_100"), ("sm_120", "sm_120"), ("sm_121", "sm_120")],
        *[("gfx942", "gfx942"), ("gfx950", "gfx942"), ("gfx1100", "gfx942")],
    ],
)
def test_gpus_without_a_line_of_their_own(target, like):
    assert configurations.target_of_line(target) == like


def test_every_configuration_is_in_the_table():
    names = ["forward", "backward_rows", "backward_columns", "jvp"]
    names += ["second_stats", "second_rows", "second_columns"]
    for target in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
        for dtype in configurations.DTYPES:
            for features in (16, 32, 64, 128, 256)[: 3 if dtype == torch.float64 else 5]:
                for name in [*names, "bias_gradient", "second_bias"]:
                    is_heavy = "bias" in name
                    found = configurations.choose(name, target, dtype, features, is_heavy)
                    assert configurations.parsed(configurations.printed(found)) == found


def test_the_fastest_configuration_is_timed_once():
    table = {"QUERIES": 64, "KEYS": 16, "num_warps": 4, "num_stages": 2}
    timed = []

    def milliseconds(run, configuration):
        timed.append(configuration)
        run(configuration)
        return 1.0 if configuration["num_warps"] == 8 else 2.0

    ran = []
    for _ in range(2):
        found = tuning.fastest("a kind", table, ran.append, milliseconds)
        assert found == {**table, "num_warps": 8}
    assert timed == ran == tuning.around(table) and len(timed) == 5
    assert all(x["QUERIES"] >= 16 and x["KEYS"] >= 16 and x["num_stages"] >= 1 for x in timed)


def test_rows_too_far_apart_for_a_tile_are_copied():
    memory = torch.empty(2**20 + 8, dtype=torch.bfloat16)
    far, near = (memory.as_strided((1, 1, 2, 8), (0, 0, row, 1)) for row in (2**20, 2**15))
    assert near_rows(far).stride(2) == 8
    assert near_rows(near) is near
