"""What only a GPU can tell: CUDA graphs, a second device. `python benchmarks/on_gpu.py` runs it."""

import pytest
import torch

from genkern.backend import use_backend
from genkern.static import calls

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# Of spectral_norm a second run starts from other vectors.
FORWARDS = [
    call for call in calls.small_calls() if call.what == "forward" and call.op != "spectral_norm"
]
by_name = pytest.mark.parametrize("call", FORWARDS, ids=lambda call: call.name)


@needs_gpu
@by_name
def test_captured_in_a_graph(call):
    with use_backend("cuda"):
        with torch.device("cuda"):
            step, _ = call.prepare()
        expected = [x.clone() for x in step()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = list(step())
        for result in captured:
            result.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


@needs_two
@by_name
def test_on_the_second_device(call):
    """While the first is the current one."""
    with use_backend("cuda"):
        with torch.device("cuda:1"):
            step, _ = call.prepare()
        results = list(step())
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 and x.isfinite().all() for x in results)
