"""Triton's main kernels, compiled for sm_80 and executed: they agree with fp64 and have no races.

In processes of their own: that of the tests interprets Triton. The workloads are those of
`genkern prove`, whose other half, CUDA's kernels, tests/cuda has.
"""

import json
import os
import subprocess
import sys

import pytest

from genkern.ptx import build

MAIN = {
    ("attention", "bfloat16"),
    ("attention", "float32"),
    ("attention second order", "bfloat16"),
    ("attention jvp", "float16"),
    ("spectral_norm", "float32"),
    ("spectral_norm", "bfloat16"),
    ("hinge D", "float32"),
    ("ragan D", "bfloat16"),
    ("feature_matching", "float32"),
    ("R1 norms", "float32"),
    ("gaussian_kl", "bfloat16"),
}


@pytest.fixture
def rows(tmp_path):
    """rows(*options): what `genkern prove` found of Triton's kernels."""
    pytest.importorskip("triton")
    try:
        build.compiler()
    except build.CompilerMissing as error:
        pytest.skip(str(error))

    def prove(*options):
        file = tmp_path / "rows.json"
        command = [sys.executable, "-m", "genkern", "prove", "--backend", "triton", *options]
        done = subprocess.run(
            [*command, "--json", str(file)],
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            capture_output=True,
            text=True,
        )
        assert file.exists(), done.stdout + done.stderr
        found = json.loads(file.read_text())
        assert (done.returncode == 0) == all(row["holds"] for row in found)
        return found

    return prove


def assert_every_one_holds(rows):
    for row in rows:
        assert row["fault"] is None and row["elsewhere"] is None, row
        assert row["error"] <= row["allowed"] and row["kernels"], row


def test_main_kernels(rows):
    found = rows()
    assert {(row["op"], row["dtype"]) for row in found} == MAIN
    assert_every_one_holds(found)


@pytest.mark.exhaustive
def test_the_whole_grid(rows):
    assert_every_one_holds(rows("--all"))
