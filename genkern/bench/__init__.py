"""The workloads and their timing, shared by `genkern bench` and the benchmarks/ folder."""
