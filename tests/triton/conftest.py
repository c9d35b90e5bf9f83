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
import torch

import genkern
from genkern.assembly import TARGETS
from genkern.ops import _triton


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """The interpreter replaces the functions of the Triton modules that a function knows, in every
    call of it, which is half of its time; once in a launch is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # older, and slower
        yield
        return
    replace, nothing = interpreter._patch_lang, interpreter._LangPatchScope()
    execute, launches, modules = interpreter.GridExecutor.__call__, [], {}

    def execute_once(self, *args, **kwargs):
        launches.append(set())
        try:
            return execute(self, *args, **kwargs)
        finally:
            launches.pop()

    def replace_once(fn):
        known = modules.get(fn)
        if known is None:
            known = {id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}
            modules[fn] = known = frozenset(known)
        if not launches:
            return replace(fn)
        if known in launches[-1]:
            return nothing
        launches[-1].add(known)
        return replace(fn)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, execute_once
    yield
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace, execute


@pytest.fixture(autouse=True)
def where_it_runs():
    """Without a GPU the interpreter takes CPU tensors; with one the tests' tensors are there."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


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
    every target or `only` some: dicts as `genkern.assembly.report` prints them. In two processes
    at a time."""

    if torch.cuda.is_available():
        pytest.skip("compiled for other GPUs only where none is at hand")

    def run(script, *arguments, only=tuple(TARGETS)):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, str(Path(__file__).parent / script)]
        halves = [",".join(half) for half in (only[0::2], only[1::2]) if half]
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


# Bytes a thread that a configuration spills and is the faster for, as measured on a GPU
# (benchmarks/NOTES.md), for kernels of half precision.
SPILLS_THAT_PAY = {
    ("sm_90", "attention_backward_columns"): 128,
    ("sm_90", "attention_second_rows"): 88,
    ("sm_90", "attention_second_columns"): 328,
}


@pytest.fixture
def fits():
    """Asserts what holds of every default configuration: no spills, and room for its memory."""

    def check(found):
        assert found, "nothing was compiled"
        for row in found:
            is_half = row["case"].startswith(("bf16", "fp16"))
            pays = SPILLS_THAT_PAY.get((row["target"], row["kernel"]), 0) if is_half else 0
            assert row["spills"] <= pays, row
            assert row["shared_bytes"] <= TARGETS[row["target"]], row

    return check
