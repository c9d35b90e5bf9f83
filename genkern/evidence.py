"""What is known of the GPU kernels, in the project's words, as the tests left it: evidence.json is
written by tests/evidence.py and by nothing else.

measured: ran on a GPU, agrees with fp64 there and was timed. executed: the compiled code ran on the
CPU (genkern/ptx) and agrees with fp64. compiled: the machine code was inspected. not run: none of
these.
"""

import json
from pathlib import Path

FILE = Path(__file__).resolve().parent / "evidence.json"
BACKENDS = ("cuda", "triton")


def load():
    """{"versions": {name: version}, "device": the GPU of what is measured, "backends": {backend:
    {op: {"measured": {pass: [dtype, …]}, "executed": the same, "compiled": [target, …]}}}}"""
    return json.loads(FILE.read_text())


def told(of_op):
    """What is known of one op on one backend: "measured: …; executed: …", or "not run"."""
    parts = []
    for word in ("measured", "executed"):
        if passes := of_op.get(word):
            parts.append(f"{word}: {_passes(passes)}")
    if compiled := of_op.get("compiled"):
        parts.append(f"compiled: {', '.join(compiled)}")
    return "; ".join(parts) or "not run"


def _passes(found):
    """Passes of the same dtypes together: "forward, backward in bf16, fp16"."""
    together = {}
    for name, dtypes in found.items():
        together.setdefault(tuple(dtypes), []).append(name)
    return ", ".join(f"{', '.join(p)} in {', '.join(d)}" for d, p in together.items())


def table(evidence, ops):
    """The README's table: a row for each of `ops`, a column for each backend."""
    lines = ["| | CUDA | Triton |", "|---|---|---|"]
    for op in ops:
        cells = []
        for backend in BACKENDS:
            of_op = evidence["backends"].get(backend, {}).get(op)
            cells.append("no kernel" if of_op is None else told(of_op))
        lines.append(f"| {op} | {' | '.join(cells)} |")
    return "\n".join(lines)
