"""Writes genkern/evidence.json and the README's table from the outcome of tests:

    python tests/evidence.py [--quick]

An op counts as executed on a backend in a dtype where a test that passed launched its kernels into
the executor, and no test that failed did. It counts as compiled for a target where the tests of the
machine code passed, and as measured where benchmarks/measured.json, which benchmarks/on_gpu.py
writes, has a time, and an error that is small enough. Triton's kernels are executed by the
workloads of `genkern prove`, in a process of their own, because that of the tests interprets
Triton; --quick takes only its quick ones, and so claims less. Takes the time of these tests:
minutes, or an hour where nothing was compiled before.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MEASURED = ROOT / "benchmarks" / "measured.json"
BEGIN, END = "<!-- evidence: written by tests/evidence.py -->", "<!-- end of evidence -->"
# By how a workload's name begins (genkern/bench): the op and its passes.
WORKLOADS = {
    "attention forward": ("attention", ["forward"]),
    "attention second order": ("attention", ["second"]),
    "attention jvp": ("attention", ["jvp"]),
    "attention": ("attention", ["forward", "backward"]),
    "spectral_norm": ("spectral_norm", ["forward", "backward"]),
    "gaussian_kl": ("gaussian_kl", ["forward", "backward"]),
    "R1 norms": ("sample_norms", ["forward", "backward"]),
    "WGAN-GP norms": ("sample_norms", ["forward", "backward"]),
    "hinge": ("losses", ["forward", "backward"]),
}
# Where an op has another name than its folder.
FOLDERS = {"adversarial_loss": "losses"}
DTYPES = ("float32", "float64", "bfloat16", "float16")
SHORT = dict(zip(DTYPES, ("fp32", "fp64", "bf16", "fp16"), strict=True))


class Watch:
    """Collects (backend, op, pass, dtype) of every launch that the executor takes: the choice of a
    backend comes first, then the launches."""

    def __init__(self):
        self.seen = set()
        self._dtypes, self._current = {}, None

    @contextlib.contextmanager
    def watching(self):
        """A set of what is executed inside the `with`."""
        from genkern import backend, ptx

        choose, record, launch = backend.choose, backend.record, ptx.Module.launch

        def watched_choose(op, tensor, *args, **options):
            self._dtypes[op.partition(".")[0]] = str(tensor.dtype).removeprefix("torch.")
            chosen = choose(op, tensor, *args, **options)
            self._note(op, chosen)
            return chosen

        def watched_record(op, chosen, reason):
            self._note(op, chosen)
            record(op, chosen, reason)

        def watched_launch(module, *args, **options):
            result = launch(module, *args, **options)
            if self._current:
                self.seen.add(self._current)
            return result

        self.seen = set()
        backend.choose, backend.record = watched_choose, watched_record
        ptx.Module.launch = watched_launch
        try:
            yield self.seen
        finally:
            backend.choose, backend.record, ptx.Module.launch = choose, record, launch

    def _note(self, op, chosen):
        family, _, of_pass = op.partition(".")
        self._current = None
        if chosen in ("cuda", "triton") and family in self._dtypes:
            folder = FOLDERS.get(family, family)
            self._current = chosen, folder, of_pass or "forward", self._dtypes[family]


class Evidence:
    """The pytest plugin."""

    def __init__(self):
        self.executed, self.failed = set(), set()
        self.compiled = defaultdict(set)  # (backend, op): targets
        self.refuted = set()  # (backend, op) whose tests of machine code failed
        self._watch = Watch()

    def pytest_collection_modifyitems(self, config, items):
        """Of tests/triton those that compile, of tests/static those of the package's sources."""
        chosen = [item for item in items if self._is_wanted(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def _is_wanted(self, item):
        folder = item.path.parent.name
        if folder == "static":
            return item.originalname == "test_no_spills"
        if item.get_closest_marker("exhaustive"):
            return False
        return folder == "cuda" or "assemblies" in item.fixturenames

    def pytest_runtest_protocol(self, item, nextitem):
        self._watching = self._watch.watching()
        self._seen = self._watching.__enter__()

    def pytest_runtest_logfinish(self, nodeid, location):
        self._watching.__exit__(None, None, None)

    def pytest_runtest_makereport(self, item, call):
        if call.when != "call":
            return
        passed = call.excinfo is None
        skipped = not passed and call.excinfo.typename == "Skipped"
        if not skipped:
            (self.executed if passed else self.failed).update(self._seen)
            for backend, op, target in self._compiled_by(item):
                self.compiled[backend, op].add(target) if passed else self.refuted.add(
                    (backend, op)
                )

    def _compiled_by(self, item):
        from genkern.assembly import TARGETS

        if "assemblies" in item.fixturenames:
            op = re.match(r"test_(.*?)(_compiled)?$", item.path.stem)[1]
            return [("triton", op, target) for target in TARGETS]
        return [("cuda", *pair) for name, pair in item.user_properties if name == "compiled"]


def executed_by_prove(which):
    """In this process, the workloads of `genkern prove` on Triton ("quick" or "everything"):
    (executed, failed)."""
    from genkern.prove import check, workloads

    executed, failed, watch = set(), set(), Watch()
    for workload in getattr(workloads, which)():
        with watch.watching() as seen:
            outcome = check.execute(workload, "triton", schedule=0)
        said = outcome.fault or outcome.elsewhere or f"error {outcome.error:.1e}"
        print(f"{workload.name}: {said}", file=sys.stderr, flush=True)
        if outcome.holds:
            executed.update(seen)
        elif outcome.elsewhere is None:
            failed.update(seen)
    return executed, failed


def executed_in_a_process_of_its_own(which):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as away:
        command = [sys.executable, str(Path(__file__).resolve()), "--prove", which]
        done = subprocess.run(command, env=environment, cwd=away, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("evidence: the workloads of `genkern prove` could not be executed")
    return ({tuple(x) for x in part} for part in json.loads(done.stdout.splitlines()[-1]))


def measured():
    """(the device, {(backend, op, pass, dtype)} that a GPU was seen to do right and was timed)."""
    if not MEASURED.exists():
        return None, set()
    document, found = json.loads(MEASURED.read_text()), set()
    for backend, results in document["backends"].items():
        for result in results:
            start = next((x for x in WORKLOADS if result["name"].startswith(x)), None)
            if start and result["exact_enough"]:
                op, passes = WORKLOADS[start]
                dtype = result["name"].split()[-1]
                found.update((backend, op, of_pass, dtype) for of_pass in passes)
    return document["device"], found


def gathered(executed, failed, compiled, measured=()):
    """evidence.json's "backends"."""
    from genkern.info import OPS

    backends = {}
    for backend in ("cuda", "triton"):
        for op, module in OPS.items():
            if backend not in module.KERNELS:
                continue
            of_op = {
                "measured": _by_pass(x[2:] for x in measured if x[:2] == (backend, op)),
                "executed": _by_pass(x[2:] for x in executed - failed if x[:2] == (backend, op)),
                "compiled": sorted(compiled.get((backend, op), ()), key=_by_number),
            }
            backends.setdefault(backend, {})[op] = of_op
    return backends


def _by_pass(found):
    """{pass: [dtype, …]}, the forward first."""
    passes = defaultdict(list)
    for of_pass, dtype in sorted(
        found, key=lambda x: (x[0] != "forward", x[0], DTYPES.index(x[1]))
    ):
        passes[of_pass].append(SHORT[dtype])
    return dict(passes)


def _by_number(target):
    return not target.startswith("sm_"), int(re.sub(r"\D", "", target)), target


def with_table(text, table):
    """The README with this table between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--quick", action="store_true", help="fewer of Triton's kernels")
    parser.add_argument("--prove", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prove:
        print(json.dumps([sorted(part) for part in executed_by_prove(args.prove)]))
        return 0
    import pytest
    import torch

    from genkern import evidence
    from genkern.info import OPS
    from genkern.ops import _triton

    plugin = Evidence()
    folders = [str(ROOT / "tests" / name) for name in ("cuda", "triton", "static")]
    options = ["-q", "-c", str(ROOT / "pyproject.toml"), "-m", ""]
    status = pytest.main([*options, *folders], plugins=[plugin])
    if status > 1:
        return status
    which = "quick" if args.quick else "everything"
    executed, failed = executed_in_a_process_of_its_own(which)
    compiled = {of: found for of, found in plugin.compiled.items() if of not in plugin.refuted}
    versions = {"torch": torch.__version__.partition("+")[0], "triton": _triton.version()}
    device, timed = measured()
    backends = gathered(plugin.executed | executed, plugin.failed | failed, compiled, timed)
    found = {"versions": versions, "device": device, "backends": backends}
    evidence.FILE.write_text(json.dumps(found, indent=1) + "\n")
    README.write_text(with_table(README.read_text(), evidence.table(found, OPS)))
    return status


if __name__ == "__main__":
    sys.exit(main())
