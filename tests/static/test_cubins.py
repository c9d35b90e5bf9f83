"""What is read of the compilers, on a source of our own; and no spills in the package's sources."""

import shutil
from pathlib import Path

import pytest

import genkern
from genkern.static import cubins, tools

CSRC = Path(genkern.__file__).resolve().parent.parent / "csrc"

SOURCE = """
#include "size.cuh"
namespace genkern { namespace cuda { namespace tiny {
template <class T, int n> __global__ void scale(T* x, int count) {
  __shared__ T shared[n];
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += n) x[i] *= shared[n - 1 - threadIdx.x];
}
template __global__ void scale<float, SIZE>(float*, int);
}}}
"""
SPILLING = """
__global__ void __launch_bounds__(1024, 2) heavy(float* x, int n) {
  float sums[96];
  for (int i = 0; i < 96; ++i) sums[i] = x[i * 1024 + threadIdx.x];
  for (int k = 0; k < n; ++k)
    for (int i = 0; i < 96; ++i) sums[i] = sums[i] * sums[(i + 1) % 96] + 1;
  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = sums[i];
}
"""


@pytest.fixture(autouse=True)
def compilers():
    try:
        tools.nvcc(), tools.cuobjdump()
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "csrc" / "tiny"
    folder.mkdir(parents=True)
    (folder / "size.cuh").write_text("#define SIZE 128\n")
    (folder / "scale.cu").write_text(SOURCE)
    return folder / "scale.cu"


def test_a_kernel(source):
    (kernel,) = cubins.kernels([source], ["sm_80"])
    assert kernel.source == "tiny/scale.cu" and kernel.op == "tiny"
    if shutil.which("c++filt"):
        assert kernel.name == "scale<fp32, 128>"
    assert kernel.shared_bytes == 128 * 4 and kernel.registers > 8 and kernel.spills == 0
    assert kernel.loop.is_loop and kernel.loop.count["global"] >= 2 and kernel.loop.tensor == 0


def test_what_is_compiled_is_kept_until_something_changes(source):
    first = cubins.compiled(source, "sm_80")
    made = first.stat().st_mtime_ns
    assert cubins.compiled(source, "sm_80") == first and first.stat().st_mtime_ns == made
    (source.parent / "size.cuh").write_text("#define SIZE 64\n")
    assert cubins.compiled(source, "sm_80") != first
    (kernel,) = cubins.kernels([source], ["sm_80"])
    assert kernel.shared_bytes == 64 * 4


def test_spills_are_seen(source):
    source.write_text(SPILLING)
    (kernel,) = cubins.kernels([source], ["sm_80"])
    assert kernel.spills > 0 and kernel.registers <= 32


def test_a_source_that_does_not_compile_is_an_error(source):
    source.write_text("__global__ void k() { nonsense; }")
    with pytest.raises(OSError, match=r'nvcc failed: [\s\S]*"nonsense" is undefined'):
        cubins.kernels([source], ["sm_80"])


def test_no_sources(tmp_path):
    with pytest.raises(OSError, match=r"no CUDA sources in .*--sources"):
        cubins.sources(tmp_path)


def test_sm_75_has_no_attention(tmp_path):
    attention, losses = tmp_path / "attention" / "x.cu", tmp_path / "losses" / "x.cu"
    assert not cubins.runs_on(attention, "sm_75") and cubins.runs_on(attention, "sm_80")
    assert cubins.runs_on(losses, "sm_75")


def assert_no_spills(files, targets):
    found = cubins.kernels(files, targets)
    assert found
    assert not [kernel for kernel in found if kernel.spills]


@pytest.mark.skipif(not CSRC.is_dir(), reason="csrc/ does not lie beside the package")
def test_no_spills_in_the_smallest_sources():
    """The others take minutes to compile."""
    files = sorted(cubins.sources(CSRC), key=lambda file: file.stat().st_size)
    small = [file for file in files if file.parent.name == "gaussian_kl"] or files[:1]
    assert_no_spills(small, ["sm_80", "sm_120"])


@pytest.mark.exhaustive
@pytest.mark.skipif(not CSRC.is_dir(), reason="csrc/ does not lie beside the package")
@pytest.mark.parametrize("target", cubins.TARGETS)
def test_no_spills(target, record_property):
    files = [file for file in cubins.sources(CSRC) if cubins.runs_on(file, target)]
    for op in {file.parent.name for file in files}:
        record_property("compiled", [op, target])  # for tests/evidence.py
    assert_no_spills(files, [target])
