"""Run by test_attention_compiled.py: compile_attention.py TARGETS CASES. Attention's kernels as the
public functions launch them, compiled for GPUs; a line of JSON each."""

import sys

import torch

import genkern
from genkern.assembly import report

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES["fp64"] = torch.float64
ROWS = 256


def leaf(*shape, dtype):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def qkv(dtype, d, dv=None, heads=2):
    dv = dv or d
    shapes = (2, 4, ROWS, d), (2, heads, ROWS, d), (2, heads, ROWS, dv)
    return [leaf(*shape, dtype=DTYPES[dtype]) for shape in shapes]


def forward_and_backward(tensors, biases=(), **options):
    out = genkern.attention(*tensors, enable_gqa=True, **options)
    torch.autograd.grad(out.sum(), [*tensors, *biases])


def every_pass(tensors, biases=(), **options):
    """Forward, backward, second order, forward mode."""
    variables = [*tensors, *biases]
    out = genkern.attention(*tensors, enable_gqa=True, **options)
    grads = torch.autograd.grad(out.sum(), variables, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in grads), variables)

    def function(*tensors):
        return genkern.attention(*tensors, enable_gqa=True, **options)

    torch.func.jvp(function, tuple(tensors), tuple(torch.ones_like(x) for x in tensors))


def heavy(call, dtype, d):
    """With everything that needs registers."""
    sums = torch.float64 if dtype == "fp64" else torch.float32
    bias = leaf(1, 4, ROWS, ROWS, dtype=sums)
    lengths = torch.full((2,), ROWS)
    options = {"window": (100, 0), "softcap": 5.0, "dropout_p": 0.1, "key_lengths": lengths}
    call(qkv(dtype, d), [bias], attn_mask=bias, **options)


def causal(call, dtype, d, dv=None):
    call(qkv(dtype, d, dv), is_causal=True)


def unmasked(call, dtype, d, dv=None):
    call(qkv(dtype, d, dv))


CASES = {
    "every pass": {"bf16 64": lambda: causal(every_pass, "bf16", 64)},
    "wide": {"bf16 128": lambda: unmasked(forward_and_backward, "bf16", 128)},
    "heavy": {"bf16 64 heavy": lambda: heavy(forward_and_backward, "bf16", 64)},
    "grid": {
        f"{dtype} {d} {kind.__name__}": lambda dtype=dtype, d=d, kind=kind: kind(
            every_pass, dtype, d
        )
        for dtype in DTYPES
        for d in (16, 64, 128, 256)
        for kind in (causal, heavy)
        if dtype != "fp64" or d <= 64
    },
    "narrow": {
        f"{dtype} 24 to 96": lambda dtype=dtype: causal(every_pass, dtype, 24, 96)
        for dtype in ("bf16", "fp16", "fp32")
    },
    "unmasked": {
        f"bf16 {d} to {dv}": lambda d=d, dv=dv: unmasked(every_pass, "bf16", d, dv)
        for width in (64, 128, 256)
        for d, dv in ((width, width), (width, width // 2), (width // 2, width))
    },
}

if __name__ == "__main__":
    targets, names = sys.argv[1].split(","), sys.argv[2].split(",")
    for name in names:
        report(CASES[name], targets)
