"""How exact CUDA attention is."""

import pytest
import torch
from attention_errors import CASES, assert_errors_are_eagers, report, results

from genkern.ops.attention.kernels import WIDEST_TWICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Heads of up to 64 features, so of kernels that other tests need too.
PLAIN = [
    (torch.float32, "few"),
    (torch.float32, "causal"),
    (torch.float32, "mean of 10"),
    (torch.float32, "bias"),
    (torch.bfloat16, "softcap"),
    (torch.bfloat16, "mean of 10"),
    (torch.float16, "causal"),
    (torch.float16, "softcap and bias, causal"),
]


@pytest.fixture
def by_kernels(device, on_cuda):
    def run(function, *args):
        found = results(function, *_on(device, args))
        ran = {(choice.op.removeprefix("attention"), choice.backend) for choice in on_cuda}
        assert ran == {(name, "cuda") for name in ("", ".backward", ".second", ".jvp")}, ran
        return _on("cpu", found)

    return run


def _on(device, x):
    """Tensors, in lists and dictionaries or not, on a device."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {name: _on(device, y) for name, y in x.items()}
    return [_on(device, y) for y in x] if isinstance(x, list | tuple) else x


def name_of(x):
    return str(x).removeprefix("torch.")


@pytest.mark.parametrize(("dtype", "case"), PLAIN, ids=name_of)
def test_errors_are_eagers(dtype, case, by_kernels):
    assert_errors_are_eagers(report(case, dtype, 1, by_kernels), dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [x for x in CASES if max(CASES[x][0][4:]) <= WIDEST_TWICE])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_errors_are_eagers_in_every_case(dtype, case, by_kernels):
    assert_errors_are_eagers(report(case, dtype, 3, by_kernels), dtype)
