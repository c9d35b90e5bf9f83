"""One workload: what is prepared per implementation, and how."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

# The error rule: at most so many times eager's error against fp64 (1.25, of second derivatives 2),
# above a floor of rounding.
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-9, torch.float16: 2**-12}


@dataclass(frozen=True)
class Workload:
    """`build(implementation, dtype)` returns the step; `others` are implementations beside eager
    and genkern; `quick` puts it in `--quick`, "compiled" with torch.compile too (a discriminator's
    normalizations take it too long). The error may be `error_ratio` times eager's."""

    op: str
    shape: str
    dtype: torch.dtype
    build: Callable
    others: tuple[str, ...] = ("compile",)
    quick: bool | str = False
    error_ratio: float = 1.25

    @property
    def name(self):
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def implementations(self):
        return ("eager", *self.others, "genkern")

    def allowed_error(self, eager_error):
        return self.error_ratio * eager_error + FLOOR[self.dtype]

    def prepare(self, implementation, device="cpu"):
        torch.manual_seed(0)
        with torch.device(device) if device != "cpu" else contextlib.nullcontext():
            if implementation == "exact":
                return self.build("eager", torch.float64)
            return self.build(implementation, self.dtype)


def largest_error(got, exact):
    """Of all tensors, each relative to its largest exact value. NaN where anything is."""
    errors = [
        (g.double() - e).abs().max() / e.abs().max().clamp_min(1e-30)
        for g, e in zip(got, exact, strict=True)
    ]
    return torch.stack(errors).max().item()


def numbers(*shape, dtype, grad=True):
    """Random values that every dtype and device gets alike: drawn in fp32 on the CPU, rounded to
    bf16's grid."""
    drawn = torch.randn(shape, device="cpu").bfloat16()
    return drawn.to(torch.get_default_device(), dtype).requires_grad_(grad)


def compiled(function, implementation):
    if implementation != "compile":
        return function
    torch._dynamo.reset()  # it compiles one function for only so many workloads
    return torch.compile(function)
