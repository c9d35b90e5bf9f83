"""Finds the compiled half, genkern._C, or says in one sentence what to do.

torch is imported first: the module's libgomp is then the one that torch loaded, so both share one
pool of threads.
"""

import os
from pathlib import Path

import torch  # noqa: F401

HERE = Path(__file__).resolve().parent
LEVELS = ("portable", "avx2", "avx512", "amx")


def _load():
    in_checkout = (HERE.parent / "csrc").is_dir()
    if in_checkout:
        _refuse_to_shadow()
    try:
        from genkern import _C
    except ImportError as error:
        if in_checkout and not list(HERE.glob("_C.*")):
            raise _unbuilt() from None
        raise ImportError(
            f"genkern's compiled kernels can't be loaded ({error}): reinstall genkern with the "
            f"Python that you are running, `python -m pip install --force-reinstall genkern`"
        ) from error
    if in_checkout and Path(_C.__file__).resolve().parent != HERE:
        raise _unbuilt()  # an editable installation of another tree offers its own module
    return _C


def _unbuilt():
    return ImportError(
        f"{HERE.parent} is genkern's source tree and its kernels are not built: run "
        f"`pip install .` and use genkern from another folder, or `pip install -e .`"
    )


def _refuse_to_shadow():
    """Python puts the current folder on its path under `python -m`: a source tree must not then
    stand in silently for a genkern that is installed elsewhere."""
    import sys
    from importlib import metadata

    elsewhere = [entry for entry in sys.path if entry and Path(entry).resolve() != HERE.parent]
    for distribution in metadata.distributions(name="genkern", path=elsewhere):
        installed = Path(str(distribution.locate_file("genkern")))
        if installed.is_dir() and installed.resolve() != HERE:
            raise ImportError(
                f"this is the source tree {HERE.parent}, but genkern is installed in "
                f"{installed.parent}: run from another folder or use the `genkern` command, or "
                f"install the source tree itself with `pip install -e .`"
            )


def _choose_level(native):
    wanted = os.environ.get("GENKERN_CPU_ISA")
    if not wanted:
        return
    if wanted not in LEVELS:
        raise ValueError(f"GENKERN_CPU_ISA must be one of {', '.join(LEVELS)}, not {wanted!r}")
    if not native.set_cpu_level(wanted):
        raise ValueError(
            f"GENKERN_CPU_ISA asks for {wanted!r}, but this machine and this build have only "
            f"{', '.join(native.cpu_levels())}"
        )


native = _load()
_choose_level(native)
