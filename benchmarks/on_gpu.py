"""Everything that only a GPU can tell, in one command, written into one file:

    python benchmarks/on_gpu.py [--quick] [--only tests|sanitizer|benchmark …] [--out gpu-report.md]

The tests of the CUDA and Triton kernels on the device, some of the CUDA kernels' under
compute-sanitizer, and the benchmarks of both backends (--quick: those of `genkern bench --quick`).
A step that fails is recorded and the rest goes on; the exit status is 0 only where every step
passed. Without a GPU it says so and leaves with status 1.
"""

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
BACKENDS = ("cuda", "triton")


@dataclass
class Step:
    """what: "tests", "sanitizer", "benchmark" or "facts". needs: what must be there, and is not:
    then the step is not run."""

    what: str
    name: str
    command: list
    environment: dict = field(default_factory=dict)
    minutes: int = 30
    needs: str = ""


@dataclass
class Outcome:
    """result: "passed", "failed: …" or "not run: …"."""

    step: Step
    result: str
    seconds: float = 0.0
    output: str = ""


# Of the tests those that run each kernel on a few sizes: a sanitizer slows them down a lot.
SANITIZED = "test_shapes or against_the_reference or test_exact"


def steps(quick=False):
    """In the order of their worth: what is right first, then how fast."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # Compiling Triton's kernels takes minutes on one core.
    at_once = ["-n", "auto"] if importlib.util.find_spec("xdist") else []
    found = [
        Step("facts", "genkern info", [python, "-m", "genkern", "info"]),
        Step(
            "tests",
            "the CUDA kernels' tests on the device",
            [*pytest, *at_once, "../tests/cuda"],
        ),
        Step(
            "tests",
            "the Triton kernels' tests on the device",
            [*pytest, *at_once, "../tests/triton"],
        ),
    ]
    sanitizer = find_sanitizer()
    for tool in SANITIZERS:
        found.append(
            Step(
                "sanitizer",
                f"compute-sanitizer {tool}",
                [
                    sanitizer or "compute-sanitizer",
                    "--tool",
                    tool,
                    "--error-exitcode",
                    "9",
                    *pytest,
                    "../tests/cuda",
                    "-k",
                    SANITIZED,
                ],
                # Freed memory must be free, and not torch's to hand out again.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                minutes=60,
                needs="" if sanitizer else "compute-sanitizer is neither on PATH nor in CUDA_HOME",
            )
        )
    for backend in BACKENDS:
        found.append(
            Step(
                "benchmark",
                f"genkern bench, backend {backend}",
                [python, "-m", "genkern", "bench", "--device", "cuda", *["--quick"] * quick],
                {"GENKERN_BACKEND": backend},
                minutes=60,
            )
        )
    return found


def find_sanitizer():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = [Path(home) / "bin", Path(home) / "compute-sanitizer"]
    places = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=places)


def run(step):
    """Runs a step beside this file; whatever goes wrong is its outcome. (In the root of the source
    tree Python would take the package that lies there, built or not.)"""
    if step.needs:
        return Outcome(step, f"not run: {step.needs}")
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            step.command,
            cwd=HERE,
            env={**os.environ, **step.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=step.minutes * 60,
        )
        output, code = done.stdout, done.returncode
        result = "passed" if code == 0 else f"failed: exit status {code}"
    except subprocess.TimeoutExpired as error:
        said = error.stdout or ""
        output = said.decode(errors="replace") if isinstance(said, bytes) else said
        result = f"failed: not done after {step.minutes} minutes"
    except OSError as error:
        output, result = "", f"failed: {error}"
    return Outcome(step, result, time.perf_counter() - begun, output)


def machine():
    """The device and the versions, a line each."""
    properties = torch.cuda.get_device_properties(0)
    lines = [
        f"device: {properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors, {properties.total_memory >> 30} GiB",
        f"driver: {_driver()}",
        f"torch {torch.__version__} of CUDA {torch.version.cuda}",
        f"Python {platform.python_version()}",
    ]
    return lines


def _driver():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return done.stdout.strip() or "unknown"


def words(outcomes):
    """{"cuda": word, "triton": word}: measured where the benchmark of a backend passed (its table
    checks every result against fp64), failed, or not run."""
    found = {}
    for backend in BACKENDS:
        results = [
            outcome.result
            for outcome in outcomes
            if outcome.step.environment.get("GENKERN_BACKEND") == backend
        ]
        found[backend] = "measured" if results == ["passed"] else "not run"
        if results and results[0].startswith("failed"):
            found[backend] = "failed"
    return found


def report(lines, outcomes):
    """The Markdown file."""
    parts = ["# genkern on a GPU\n", *(f"- {line}" for line in lines), ""]
    parts += [f"- {backend}: **{word}**" for backend, word in words(outcomes).items()]
    parts += ["", "| step | result | seconds |", "|---|---|--:|"]
    parts += [f"| {x.step.name} | {x.result} | {x.seconds:.0f} |" for x in outcomes]
    for outcome in outcomes:
        parts += ["", f"## {outcome.step.name}", "", f"`{_shown(outcome.step)}`", ""]
        parts += ["```", outcome.output.strip() or outcome.result, "```"]
    return "\n".join(parts) + "\n"


def _shown(step):
    assignments = [f"{name}={value}" for name, value in step.environment.items()]
    return shlex.join([*assignments, Path(step.command[0]).name, *step.command[1:]])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="gpu-report.md", help="the report (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only show the steps")
    parser.add_argument("--quick", action="store_true", help="a selection of the benchmarks")
    kinds = "tests", "sanitizer", "benchmark"
    parser.add_argument("--only", nargs="+", choices=kinds, help="only steps of these kinds")
    args = parser.parse_args(argv)
    chosen = [x for x in steps(args.quick) if not args.only or x.what in ("facts", *args.only)]
    if args.dry_run:
        for step in chosen:
            print(_shown(step) + (f"  (not run: {step.needs})" if step.needs else ""))
        return 0
    if not torch.cuda.is_available():
        print("on_gpu: torch sees no GPU on this machine, so nothing was run", file=sys.stderr)
        return 1
    lines, outcomes = machine(), []
    for step in chosen:
        print(f"{step.name} … ", end="", flush=True)
        outcomes.append(run(step))
        print(f"{outcomes[-1].result} ({outcomes[-1].seconds:.0f} s)", flush=True)
        # After every step: whatever stops the machine leaves what is known.
        Path(args.out).write_text(report(lines, outcomes))
    print(f"written to {args.out}")
    return 0 if all(outcome.result == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
