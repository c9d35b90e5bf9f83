"""`genkern prove`: the package's GPU kernels executed on the CPU.

The PTX that nvcc and Triton made of the shipped kernels runs in genkern/ptx, which checks every
access and looks for races; what comes out is compared with fp64. Then a barrier is taken away from
one of the kernels, to see that this is noticed.
"""
