"""Gathers the facts of the report as plain values. A part that this machine can't make is a
sentence that says why, under "missing"."""

import contextlib
import platform

import torch

import genkern
from genkern import ptx
from genkern.backend import has_cuda
from genkern.ops import _triton
from genkern.ptx import shipped
from genkern.static import calls, cubins, peer, rooflines, tools, triton_kernels
from genkern.static.hardware import LIMITS, occupancy


def gather(op="", targets=cubins.TARGETS, sources=None, say=lambda text: None):
    """The report on ops whose names begin so. `say` is told what is being done."""
    unknown = [target for target in targets if target not in LIMITS]
    if unknown:
        raise ValueError(f"--targets must be among {', '.join(LIMITS)}, not {', '.join(unknown)}")
    chosen = [call for call in calls.all_calls() if call.op.startswith(op)]
    small = [call for call in calls.small_calls() if call.op.startswith(op)]
    if not chosen:
        raise ValueError(f"no op's name begins with {op!r}")
    command = ["genkern static", *([op] if op else [])]
    if tuple(targets) != cubins.TARGETS:
        command.append(f"--targets {','.join(targets)}")
    facts = {"command": " ".join(command), "versions": _versions(), "targets": list(targets)}
    facts["missing"] = {}

    def part(name, make):
        say(name)

        def tell(text):
            say(f"{name}: {text}")

        try:
            facts[name] = make(tell)
        except (OSError, RuntimeError, ImportError) as error:
            facts["missing"][name] = str(error)

    part("calls", lambda tell: _calls(chosen))
    part("cuda", lambda tell: _cuda(op, targets, sources, facts.get("calls", []), tell))
    part("ptx", lambda tell: cubins.ptx_bytes(_sources(op, sources)))
    part("triton", lambda tell: _of_triton(chosen, targets, tell))
    part("bytes", lambda tell: _bytes(small, tell))
    if "attention".startswith(op) or op.startswith("attention"):
        ours = facts.get("cuda", []), facts.get("triton", [])
        part("peer", lambda tell: peer.compared(targets, *ours, say=tell))
    return facts


def _versions():
    versions = {"genkern": genkern.__version__, "torch": torch.__version__}
    versions["Triton"] = _triton.version() or "not installed"
    versions["Python"] = platform.python_version()
    try:
        versions["nvcc"] = tools.nvcc_version()
        versions["cuobjdump"] = tools.version_of(tools.cuobjdump())
    except OSError:
        versions.setdefault("nvcc", "not found")
    return versions


def _sources(op, folder):
    found = [source for source in cubins.sources(folder) if source.parent.name.startswith(op)]
    if not found:
        raise OSError(f"no CUDA kernel's folder begins with {op!r}")
    return found


def _calls(of_calls):
    """Each call with what it launches on the CUDA backend, and the least that it has to do."""
    if not has_cuda():
        raise RuntimeError("the CUDA half was not built: `genkern info` says why")
    rows = []
    for call in of_calls:
        launches, inputs, results = calls.step_under("cuda", call, _recording)
        names = tools.demangled(launch.kernel for launch in launches)
        row = {"call": call.name, "operations": call.operations}
        row["triton_launches"] = _count_triton(call)
        row["least_bytes"] = calls.least_bytes(inputs, results)
        row["launches"] = [
            {
                "symbol": launch.kernel,
                "kernel": cubins.short(names[launch.kernel]),
                "grid": list(launch.grid),
                "threads": launch.block[0] * launch.block[1] * launch.block[2],
                "dynamic_bytes": launch.shared_bytes,
            }
            for launch in launches
        ]
        found = rooflines.bounds(call, row["least_bytes"])
        row["bounds"] = {target: list(bound) for target, bound in found.items()}
        rows.append(row)
    return rows


@contextlib.contextmanager
def _recording():
    """CUDA's launches; a pass that CUDA lacks goes to Triton, and is not launched either."""
    with _triton.recording("sm_80"), ptx.recording() as launches:
        yield launches


def _count_triton(call):
    if _triton.problem():
        return None
    return len(calls.step_under("triton", call, lambda: _triton.recording("sm_80"))[0])


def _cuda(op, targets, sources, of_calls, say=lambda text: None):
    """A row for every kernel and target; threads and all of its shared memory where a default
    call launches it."""
    rows, launches = [], [launch for call in of_calls for launch in call["launches"]]
    for kernel in cubins.kernels(_sources(op, sources), targets, say):
        mine = [launch for launch in launches if launch["symbol"] == kernel.symbol]
        biggest = max(mine, key=lambda x: (x["dynamic_bytes"], x["threads"]), default=None)
        row = {
            "op": kernel.op,
            "kernel": kernel.name,
            "backend": "cuda",
            "target": kernel.target,
            "registers": kernel.registers,
            "spills": kernel.spills,
            "stack": kernel.stack,
            "static_bytes": kernel.shared_bytes,
            "loop": _loop(kernel.loop),
        }
        if biggest:
            row["shared_bytes"] = kernel.shared_bytes + biggest["dynamic_bytes"]
            row["threads"] = biggest["threads"]
            row["occupancy"] = _occupancy(row)
        rows.append(row)
    return rows


def _of_triton(of_calls, targets, say):
    if problem := _triton.problem():
        raise RuntimeError(problem)
    rows = []
    for kernel in triton_kernels.kernels(of_calls, [t for t in targets if t != "sm_75"], say):
        row = {"op": kernel.op, "kernel": kernel.name, "backend": "triton"}
        row |= {key: getattr(kernel, key) for key in ("target", "registers", "spills")}
        row |= {"shared_bytes": kernel.shared_bytes, "threads": kernel.threads}
        row |= {"loop": _loop(kernel.loop), "occupancy": _occupancy(row)}
        rows.append(row)
    return rows


def _occupancy(row):
    found = occupancy(row["target"], row["threads"], row["registers"], row["shared_bytes"])
    return found._asdict()


def _loop(loop):
    """A `sass.Loop` as plain values."""
    kinds = {kind: loop.count[kind] for kind in sorted(loop.count)}
    return {"all": loop.all, "memory": loop.memory, "is_loop": loop.is_loop, **kinds}


def _bytes(of_calls, say):
    """What the kernels move in global memory as the executor counts it, beside the least."""
    if not has_cuda():
        raise RuntimeError("the CUDA half was not built: `genkern info` says why")
    rows = []
    for call in of_calls:
        say(call.name)
        launches, inputs, results = calls.step_under("cuda", call, ptx.executing)
        if not launches or any(launch.kernel not in shipped.kernels() for launch in launches):
            continue  # a pass that CUDA lacks
        rows.append(
            {
                "call": call.name,
                "launches": len(launches),
                "read": sum(launch.result.bytes_read for launch in launches),
                "written": sum(launch.result.bytes_written for launch in launches),
                "least": calls.least_bytes(inputs, results),
            }
        )
    return rows
