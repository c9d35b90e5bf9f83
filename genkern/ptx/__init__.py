"""Executes PTX on the CPU, and checks it while it runs."""

from genkern.ptx.executing import Launched, executing, recording

__all__ = ["Launched", "executing", "recording"]
