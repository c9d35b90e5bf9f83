"""Launches of Triton's attention kernels: the functions of kernels.py, with the same results."""

import torch

from genkern.ops import _triton
from genkern.ops._tensors import ARITHMETIC
from genkern.ops.attention import kernels
from genkern.ops.attention.arguments import check_longest
from genkern.ops.attention.triton import configurations
from genkern.ops.attention.triton.forward import attention_forward
from genkern.ops.attention.triton.problem import heads, numbers, problem_of


def forward(inputs, fixed, settings, want_lse):
    """(out [B, H, N, dv], lse [B, H, N] or None, rows)"""
    call = Call(inputs, fixed, settings)
    q, _, v, _, _ = call.inputs
    out = kernels.laid_out_like(q, v.shape[3])
    lse = kernels.new_row_numbers(q) if want_lse else None
    rows = kernels.new_rows(q)
    call.over_queries(
        attention_forward,
        "forward",
        heads(out, fixed),
        *(numbers(x, fixed) for x in rows),
        numbers(lse, fixed),
    )
    return out, lse, rows


class Call:
    """What the launches of one pass share."""

    def __init__(self, inputs, fixed, settings):
        self.inputs = kernels.readable_inputs(inputs)
        self.fixed = fixed._replace(seed=_on(self.inputs[0].device, fixed.seed))
        self.settings = check_longest(self.inputs, fixed, settings)
        self.problem = problem_of(self.inputs, self.fixed, self.settings)

    def over_queries(self, kernel, name, *args, **options):
        """A program for every block of queries of every head."""
        q = self.inputs[0]
        sequences, longest = q.shape[0], q.shape[2]
        if self.fixed.q_starts is not None:
            sequences, longest = self.fixed.q_starts.shape[0] - 1, self.settings.longest_q
        chosen = self._options(name)
        blocks = -(-longest // chosen["QUERIES"])
        self._launch(kernel, blocks, sequences * q.shape[1], args, {**chosen, **options})

    def over_keys(self, kernel, name, *args, **options):
        """A program for every block of keys of every key head."""
        k = self.inputs[1]
        sequences, longest = k.shape[0], k.shape[2]
        if self.fixed.k_starts is not None:
            sequences, longest = self.fixed.k_starts.shape[0] - 1, self.settings.longest_k
        chosen = self._options(name)
        blocks = -(-longest // chosen["KEYS"])
        self._launch(kernel, blocks, sequences * k.shape[1], args, {**chosen, **options})

    def _launch(self, kernel, blocks, heads, args, options):
        if blocks and heads:
            with _triton.on_device(self.inputs[0]):
                _triton.launch(kernel, (blocks * heads,), self.problem, *args, blocks, **options)

    def _options(self, name):
        """The constants of a kernel, and its configuration."""
        import triton.language as tl

        q, _, v, _, _ = self.inputs
        d, dv = q.shape[3], v.shape[3]
        D, DV = (max(16, 1 << (n - 1).bit_length()) for n in (max(d, 1), max(dv, 1)))
        chosen = configurations.choose(name, _triton.target(q), q.dtype, max(D, DV))
        wide = ARITHMETIC[q.dtype] == torch.float64
        return {
            "d": d,
            "dv": dv,
            "D": D,
            "DV": DV,
            "A": tl.float64 if wide else tl.float32,
            "PRECISION": "ieee",
            **chosen,
        }


def _on(device, seed):
    """A seed drawn on the CPU moves without a wait."""
    return None if seed is None else seed.to(device, non_blocking=True)
