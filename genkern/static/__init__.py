"""What the GPU kernels are made of, read from what the compilers make of them: `genkern static`.

Nothing here runs on a GPU and nothing is a measurement: registers, spills, shared memory, occupancy
and instructions are read from the machine code, launches and bytes are counted on the CPU, and the
times of rooflines.py are lower bounds that follow from the manufacturer's numbers.
"""
