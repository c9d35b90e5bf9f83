"""What the tests of Triton's kernels share: the backend, and compiling for GPUs that are not here.

Kernels run in the interpreter (tests/conftest.py), which knows nothing of registers, spills or
tensor cores; for those they are compiled ahead of time, by scripts beside the tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import genkern
from genkern.assembly import TARGETS
from genkern.ops import _triton


@pytest.fixture
def on_triton():
    """Every op of the test is asked of Triton; gives the log of who ran."""
    with genkern.use_backend("triton"), genkern.explain() as log:
        yield log


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    names, launch = [], _triton.launch

    def counted(kernel, *args, **options):
        names.append(kernel.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(_triton, "launch", counted)
    return names


@pytest.fixture(scope="session")
def assemblies():
    """assemblies(script, *arguments): what the kernels of a script beside the tests compile to, for
    every target: dicts as `genkern.assembly.report` prints them. Two targets at a time."""

    def run(script, *arguments):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, str(Path(__file__).parent / script)]
        halves = [",".join(list(TARGETS)[0::2]), ",".join(list(TARGETS)[1::2])]
        processes = [
            subprocess.Popen(
                [*command, half, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for half in halves
        ]
        found = []
        for process in processes:
            out, err = process.communicate()
            assert process.returncode == 0, err
            found += [json.loads(line) for line in out.splitlines()]
        return found

    return run


@pytest.fixture
def fits():
    """Asserts what holds of every default configuration: no spills, and room for its memory."""

    def check(found):
        assert found, "nothing was compiled"
        assert {row["target"] for row in found} == set(TARGETS)
        for row in found:
            assert row["spills"] == 0, row
            assert row["shared_bytes"] <= TARGETS[row["target"]], row

    return check
