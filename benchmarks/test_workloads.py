"""The workloads of `genkern bench` under pytest-benchmark, one group a workload:

    pytest benchmarks --benchmark-enable --benchmark-columns=median,iqr,rounds -k attention

Implementations are timed one after the other here; `genkern bench` interleaves them, so its ratios
are the ones to quote.
"""

import pytest

from genkern.bench.workloads import all_workloads

CASES = [
    pytest.param(workload, name, id=f"{workload.name} {name}")
    for workload in all_workloads()
    for name in workload.implementations
]


@pytest.mark.parametrize(("workload", "implementation"), CASES)
def test_step(benchmark, workload, implementation):
    benchmark.group = workload.name
    step = workload.prepare(implementation)
    step()  # compilation and first touches are no part of it
    results = benchmark(step)
    assert all(result.isfinite().all() for result in results)
