"""What the tests of the CUDA kernels share: on a GPU they run there; without one, and that is the
usual case, their tensors are on the CPU and the executor (genkern/ptx) runs the kernels' PTX."""

import contextlib

import pytest
import torch

import genkern
from genkern import ptx
from genkern.backend import has_cuda

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def cuda_half():
    if not has_cuda():
        pytest.skip(
            "the CUDA kernels were not built (`genkern info` says why): "
            "GENKERN_CUDA=1 pip install '.[test,nvcc]' brings an nvcc from PyPI"
        )


@pytest.fixture
def device():
    """Where a test puts its tensors."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def schedule():
    """In which order the executor runs threads; to be parametrized where it matters."""
    return "sequential"


@pytest.fixture
def launches(schedule):
    """The launches of the test, as `ptx.executing` lists them."""
    if HAS_GPU:
        pytest.skip("launches are counted where they are executed on the CPU")
    with ptx.executing(schedule) as found:
        yield found


@pytest.fixture
def on_cuda(request):
    """Every op of the test is asked of the CUDA kernels; gives the log of who ran."""
    if not HAS_GPU:
        request.getfixturevalue("launches")
    with genkern.use_backend("cuda"), genkern.explain() as log:
        yield log


@pytest.fixture(scope="session")
def running_cuda():
    """The same for hypothesis, whose examples have no fixtures: `with running_cuda() as log`."""

    @contextlib.contextmanager
    def run(schedule="sequential"):
        executing = contextlib.nullcontext() if HAS_GPU else ptx.executing(schedule)
        with executing, genkern.use_backend("cuda"), genkern.explain() as log:
            yield log

    return run
