"""How exact CUDA attention is."""

import pytest
import torch
from attention_errors import CASES, assert_errors_are_eagers, report, results

from genkern.ops.attention.choice import WIDEST_TWICE, choose

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
    draws = 6 if dtype == torch.float32 else 2
    assert_errors_are_eagers(report(case, dtype, draws, by_kernels), dtype)


def test_heads_beyond_the_kernels_of_second_order(running_cuda, device):
    """Forward and backward have kernels for wider heads; nothing has one for fp64."""
    wide = torch.randn(1, 1, 5, WIDEST_TWICE + 1, device=device)
    fp64 = torch.randn(1, 1, 5, 8, device=device, dtype=torch.float64)
    ours = ["attention", "attention.backward"]
    for x, on_kernels in ((wide, ours), (fp64, [])):
        what = f"heads of more than {WIDEST_TWICE} features" if on_kernels else "torch.float64"
        with running_cuda() as log:
            for op in (*ours, "attention.second", "attention.jvp"):
                choose(op, (x, x, x))
        assert [choice.op for choice in log if choice.backend == "cuda"] == on_kernels
        others = [choice for choice in log if choice.backend != "cuda"]
        assert len(others) == 4 - len(on_kernels)
        assert all(what in choice.reason for choice in others), others
