"""Attention's Triton kernels in the interpreter, against the reference in fp64."""
