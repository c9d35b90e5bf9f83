"""`genkern info`: what was built, what was chosen, and why anything is missing."""

import json
import os
import platform
from pathlib import Path

import torch

import genkern
from genkern import evidence
from genkern._native import LEVELS, native
from genkern.backend import BACKENDS, has_cuda
from genkern.ops import _triton as _triton_backend
from genkern.ops.attention import choice as attention
from genkern.ops.differences import op as differences
from genkern.ops.gaussian_kl import op as gaussian_kl
from genkern.ops.linear_cross_entropy import op as linear_cross_entropy
from genkern.ops.losses import op as losses
from genkern.ops.sample_norms import op as sample_norms
from genkern.ops.spectral_norm import op as spectral_norm

OPS = {
    "attention": attention,
    "spectral_norm": spectral_norm,
    "losses": losses,
    "differences": differences,
    "sample_norms": sample_norms,
    "linear_cross_entropy": linear_cross_entropy,
    "gaussian_kl": gaussian_kl,
}


def add_info_parser(commands):
    parser = commands.add_parser(
        "info", help="versions, backends, instruction sets, and why anything is missing"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(func=run)


def run(args):
    facts = gather()
    print(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0


def gather():
    """All facts as a dict of plain values."""
    built = json.loads(native.build_info)
    return {
        "genkern": {"version": genkern.__version__, "folder": str(Path(genkern.__file__).parent)},
        "python": platform.python_version(),
        "torch": {"version": torch.__version__, "threads": torch.get_num_threads()},
        "cpu": {
            "model": cpu_model(),
            "level": native.cpu_level(),
            "chosen by": "GENKERN_CPU_ISA" if os.environ.get("GENKERN_CPU_ISA") else "cpuid",
            "levels": {name: _level_state(name, built) for name in LEVELS},
            "compiler": built["compiler"],
        },
        "openmp": _openmp(built),
        "cuda": _cuda(built),
        "triton": _triton(),
        "backend": os.environ.get("GENKERN_BACKEND") or "by the tensors' device",
        "ops": {
            name: [b for b in BACKENDS if b == "reference" or b in of_op.KERNELS]
            for name, of_op in OPS.items()
        },
        "evidence": evidence.load(),
    }


def cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _level_state(name, built):
    if name in native.cpu_levels():
        return "usable"
    if name in built["levels"]:
        return "built, but this machine or its kernel does not allow it"
    return built["missing"].get(name, "not built for this architecture")


def _openmp(built):
    if not built["openmp"]:
        return built["missing"].get("openmp", "not built: kernels run on one thread")
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return "built"
    loaded = sorted({line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line})
    shared = "shared with torch" if len(loaded) == 1 else "beside torch's own"
    return f"{shared}: {', '.join(Path(path).name for path in loaded)}"


def _cuda(built):
    if not has_cuda():
        return {"built": False, "why not": built["missing"].get("cuda", "unknown")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"built": True, **built["cuda"], "device": device or "none visible to torch"}


def _triton():
    return {
        "version": _triton_backend.version() or "not installed",
        "tested with": f"{_triton_backend.OLDEST_TESTED} to {_triton_backend.NEWEST_TESTED}",
        "problem": _triton_backend.problem(),
    }


def render(facts):
    """The facts as lines of text."""
    cpu, cuda = facts["cpu"], facts["cuda"]
    lines = [
        f"genkern   {facts['genkern']['version']}  in {facts['genkern']['folder']}",
        f"python    {facts['python']}",
        f"torch     {facts['torch']['version']}, {facts['torch']['threads']} threads",
        f"cpu       {cpu['model']}",
        f"          kernels run at level {cpu['level']} (chosen by {cpu['chosen by']})",
    ]
    lines += [f"          {name:9} {state}" for name, state in cpu["levels"].items()]
    lines.append(f"          compiled by {cpu['compiler']}")
    lines.append(f"openmp    {facts['openmp']}")
    if cuda["built"]:
        lines.append(f"cuda      built by nvcc {cuda['nvcc']} for {', '.join(cuda['targets'])}")
        lines.append(f"          targets from {cuda['chosen']}; device: {cuda['device']}")
    else:
        lines.append(f"cuda      not built: {cuda['why not']}")
    triton = facts["triton"]
    lines.append(
        f"triton    {triton['version']} (the kernels are tested with {triton['tested with']})"
    )
    if triton["problem"]:
        lines.append(f"          not used: {triton['problem']}")
    else:
        lines.append("          their source agrees with fp64 in Triton's interpreter")
    lines.append(f"backend   {facts['backend']}")
    lines += [f"          {op:20} {', '.join(names)}" for op, names in facts["ops"].items()]
    device = facts["evidence"]["device"]
    lines.append(f"evidence  of the release's tests; measured on: {device or 'no GPU'}")
    for backend, ops in facts["evidence"]["backends"].items():
        for op, of_op in ops.items():
            lines.append(f"          {backend:7} {op:15} {evidence.told(of_op)}")
    return "\n".join(lines)
