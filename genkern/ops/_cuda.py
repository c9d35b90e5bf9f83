"""Launches of CUDA kernels that something else than the driver takes.

Every CUDA kernel is launched by csrc/common/launch.cuh, which a hook can watch or replace; inside
`taking` the CUDA backend therefore runs on CPU tensors.
"""

import contextlib

from genkern._native import native

_is_taken = False


@contextlib.contextmanager
def taking(function):
    """function(kernel, grid, block, shared_bytes, arguments) is called in the place of every
    launch, where `kernel` is the mangled name and `arguments` the bytes of each parameter."""
    global _is_taken
    if _is_taken:
        raise RuntimeError("CUDA launches are being taken already")
    if not hasattr(native, "set_launch_hook"):
        yield  # nothing was built that could launch
        return
    native.set_launch_hook(function)
    _is_taken = True
    try:
        yield
    finally:
        native.set_launch_hook(None)
        _is_taken = False


def is_taken():
    """Whether launches go elsewhere than to a driver, so that tensors may be on the CPU."""
    return _is_taken
