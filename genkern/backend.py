"""Which backend runs an op: the device's own kernels, or what the user asked for.

`cpu` and `cuda` are the compiled kernels, `triton` the Triton ones, `reference` plain PyTorch: the
meaning of every op, slow, differentiable any number of times.
"""

import contextlib
import os
import threading
from contextvars import ContextVar
from typing import NamedTuple

import torch

from genkern._native import native
from genkern.ops import _cuda, _triton

BACKENDS = ("cpu", "cuda", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Choice(NamedTuple):
    """One decision: `op` ("attention", "attention.backward", …) ran on `backend`, and why."""

    op: str
    backend: str
    reason: str

    def __str__(self):
        return f"{self.op}: {self.backend} ({self.reason})"


def _from_environment():
    name = os.environ.get("GENKERN_BACKEND") or None
    if name is not None:
        _check(name, "GENKERN_BACKEND")
    return name


def _check(name, where):
    if name not in BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(BACKENDS)}, not {name!r}")


_DEFAULT = _from_environment()
_wanted = ContextVar("genkern_backend", default=_DEFAULT)
wanted = _wanted.get  # the backend that somebody asked for, or None
_wanted_last = [_DEFAULT]  # by any thread: autograd's threads for GPUs have no context of their own
listeners = []  # the lists that `explain` has handed out


@contextlib.contextmanager
def use_backend(name):
    """Runs the ops inside the `with` on one backend: "cpu", "cuda", "triton" or "reference".

    An op that this backend does not have falls to the next that can; `explain` tells. The backward
    of an op runs where its forward ran. The environment variable GENKERN_BACKEND sets the default.

    Raises ValueError for another name, and from an op when its tensors are on the wrong device.
    """
    _check(name, "the backend's name")
    token = _wanted.set(name)
    _wanted_last.append(name)
    try:
        yield
    finally:
        _wanted.reset(token)
        _wanted_last.remove(name)


@contextlib.contextmanager
def explain():
    """Collects a `Choice` for every op and every backward that runs inside the `with`.

    with genkern.explain() as log:
        genkern.attention(q, k, v)
    print(*log, sep="\\n")
    """
    log = []
    listeners.append(log)
    try:
        yield log
    finally:
        listeners[:] = [other for other in listeners if other is not log]


def record(op, backend, reason):
    """Tells whoever listens (see `explain`)."""
    for log in listeners:
        log.append(Choice(op, backend, reason))


def choose(op, tensor, kernels, what=None):
    """The backend for `op` on tensors like `tensor`; `kernels` names those that `op` has beside
    the reference, on one device the preferred first; `what`: what it is that others may lack, if
    not the dtype. The tensors' device and dtype are uniform: op.py has checked that."""
    asked_for = _wanted.get()
    if asked_for is None and not tensor.is_cpu and not _is_pythons_own_thread():
        asked_for = _wanted_last[-1]
    what = what or tensor.dtype
    if asked_for is None:
        backend, reason = _default(tensor, kernels, what)
    else:
        backend, reason = _forced(op, asked_for, tensor, kernels, what)
    if listeners:
        record(op, backend, reason)
    return backend


def _is_pythons_own_thread():
    return not isinstance(threading.current_thread(), threading._DummyThread)


def _default(tensor, kernels, what):
    if tensor.is_cpu:
        if tensor.dtype in KERNEL_DTYPES and "cpu" in kernels:
            return "cpu", "the tensors' device"
        return "reference", f"no CPU kernel for {what}"
    problems = []
    if tensor.is_cuda and tensor.dtype in KERNEL_DTYPES:
        for backend in kernels:
            problem = _problem(backend) if backend != "cpu" else "for CPU tensors"
            if problem is None:
                return backend, "; ".join(["the tensors' device", *problems])
            if backend != "cpu":
                problems.append(problem)
    if problems:
        return "reference", "; ".join(problems)
    return "reference", f"no kernel for {tensor.device.type} and {what}"


def _problem(backend):
    """Why a GPU backend can't be used in this installation, or None."""
    if backend == "triton":
        return _triton.problem()
    if not has_cuda():
        return "the CUDA kernels were not built: see `genkern info`"
    return "the CUDA kernels are for NVIDIA" if torch.version.hip else None


def _forced(op, wanted, tensor, kernels, what):
    if wanted == "reference":
        return "reference", "asked for"
    device = "cpu" if wanted == "cpu" else "cuda"
    if tensor.device.type != device and not _takes_cpu_tensors(wanted):
        hint = ", or TRITON_INTERPRET=1 in the environment" if wanted == "triton" else ""
        raise ValueError(
            f"{op}: backend {wanted!r} needs tensors on a {device} device{hint}, and these are on "
            f"{tensor.device}"
        )
    if wanted != "cpu" and (problem := _problem(wanted)):
        raise RuntimeError(f"{op}: backend {wanted!r} was asked for: {problem}")
    interpreted = wanted == "triton" and tensor.is_cpu and not _triton.is_taken()
    lacks_bf16 = interpreted and tensor.dtype == torch.bfloat16
    if wanted in kernels and tensor.dtype in KERNEL_DTYPES and not lacks_bf16:
        return wanted, "asked for"
    backend, reason = _default(tensor, kernels, what)
    if lacks_bf16:
        return backend, f"Triton's interpreter computes {tensor.dtype} wrongly; {reason}"
    return backend, f"{wanted!r} was asked for and has no {op} for {what}; {reason}"


def _takes_cpu_tensors(backend):
    """Whether a GPU backend's launches go elsewhere than to a GPU now."""
    if backend == "triton":
        return _triton.is_interpreting() or _triton.is_taken()
    return backend == "cuda" and _cuda.is_taken()


def has_cuda():
    """Whether the CUDA half was built into this installation (a driver is another question)."""
    return hasattr(native, "adversarial_forward_cuda")
