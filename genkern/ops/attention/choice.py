"""Which backend computes a pass of attention, and what those of GPUs cannot."""

import torch

from genkern import backend as backends
from genkern.ops import _triton

KERNELS = ("triton", "cuda", "cpu")
FIRST_IN_FP32 = "cuda"  # on an H100 Triton's products in fp32 took 2.1 to 2.4 times as long
WIDEST_ON_GPU = 256
WIDEST_FP64 = 64  # on Triton: more do not fit into registers
WIDEST_TWICE = 128  # on CUDA, for the passes of second order and forward mode
_TWICE = (".second", ".jvp")
_TOO_OLD = ("sm_70", "sm_72", "sm_75")


def choose(op, inputs):
    """The backend for inputs like these."""
    if inputs[0].is_cpu and backends.wanted() is None:
        return backends.choose(op, inputs[0], ("cpu",))
    beyond = {"triton": _beyond_triton(*inputs[:3]), "cuda": _beyond_cuda(op, *inputs[:3])}
    able = tuple(name for name in KERNELS if not beyond.get(name))
    if inputs[0].dtype == torch.float32 and FIRST_IN_FP32 in able:
        able = (FIRST_IN_FP32, *(name for name in able if name != FIRST_IN_FP32))
    what = beyond.get(backends.wanted()) or beyond["triton"] or beyond["cuda"]
    return backends.choose(op, inputs[0], able, what)


def _beyond_both(q, k, v):
    """What the kernels for GPUs don't do, or None."""
    if max(q.shape[3], v.shape[3]) > WIDEST_ON_GPU:
        return f"heads of more than {WIDEST_ON_GPU} features"
    if q.shape[2] + k.shape[2] >= 2**31:
        return "2**31 rows"
    return None


def _beyond_triton(q, k, v):
    """What Triton's kernels don't do, or None."""
    if beyond := _beyond_both(q, k, v):
        return beyond
    if q.is_cpu and backends.wanted() != "triton":
        return None  # nobody asks
    if q.dtype == torch.float64 and _triton.problem() is None:
        if not _triton.has_fp64_products():
            return f"{q.dtype} with a Triton older than 3.5"
        if max(q.shape[3], v.shape[3]) > WIDEST_FP64 and _triton.target(q) != "interpreter":
            return f"{q.dtype} heads of more than {WIDEST_FP64} features"
    if q.is_cuda and _triton.target(q) in _TOO_OLD:
        return "GPUs older than sm_80"
    return None


def _beyond_cuda(op, q, k, v):
    """What the CUDA kernels don't do, or None."""
    if q.is_cpu and backends.wanted() != "cuda":
        return None  # nobody asks
    if beyond := _beyond_both(q, k, v):
        return beyond
    if q.dtype == torch.float64:
        return f"{q.dtype}"
    if op.endswith(_TWICE) and max(q.shape[3], v.shape[3]) > WIDEST_TWICE:
        return f"heads of more than {WIDEST_TWICE} features"
    if q.is_cuda and _triton.target(q) in _TOO_OLD:
        return "GPUs older than sm_80"
    return None


def following(op, backend, inputs):
    """(backend, reason) for a pass whose forward ran on a backend: the same one where it has the
    pass."""
    beyond = _beyond_cuda(op, *inputs[:3]) if backend == "cuda" else None
    if beyond is None:
        return backend, "the forward ran there"
    problem = _triton.problem() or _beyond_triton(*inputs[:3])
    why = f"the forward ran on 'cuda', which has no {op} for {beyond}"
    return ("reference", f"{why}; {problem}") if problem else ("triton", why)
