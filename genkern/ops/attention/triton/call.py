"""One call of an attention kernel's pass: what its launches share."""

import torch

from genkern.ops import _device, _triton
from genkern.ops._tensors import ARITHMETIC
from genkern.ops.attention import kernels
from genkern.ops.attention.arguments import check_longest
from genkern.ops.attention.triton import configurations, tuning
from genkern.ops.attention.triton.problem import bias_of, heads, numbers, problem_of
from genkern.ops.attention.triton.tangents import Tangents

# Within a tile offsets are 32-bit: of 128 rows, so far apart at most, in elements.
_FARTHEST_ROWS = 2**24


class Call:
    """What the launches of one pass share."""

    def __init__(self, inputs, fixed, settings):
        q, k, v, bias, key_bias = kernels.readable_inputs(inputs)
        q, k, v = near_rows(q), near_rows(k), near_rows(v)
        if bias is not None and bias.dtype == torch.bool and q.dtype == torch.float64:
            bias = bias if _triton.has_fp64_products_of_bytes() else _as_numbers(bias)
        self.inputs = q, k, v, bias, key_bias
        self.fixed = fixed._replace(seed=_on(self.inputs[0].device, fixed.seed))
        self.settings = check_longest(self.inputs, fixed, settings)
        self.problem = problem_of(self.inputs, self.fixed, self.settings)
        self.is_heavy = bool(
            settings.softcap or settings.dropout_p or bias is not None or key_bias is not None
        )
        self.uneven = [_is_uneven(q) or _is_uneven(k), _is_uneven(v)]
        d, dv = q.shape[3], v.shape[3]
        self.constants = {
            "d": d,
            "dv": dv,
            "D": _padded(d),
            "DV": _padded(dv),
            "A": _triton.element_type(ARITHMETIC[q.dtype]),
            "PRECISION": "ieee",
        }

    # ---- Arguments

    def heads(self, x):
        return heads(x, self.fixed)

    def numbers(self, x):
        return numbers(x, self.fixed)

    def tangents(self, tangents):
        q, k, v, bias, key_bias = kernels.readable_tangents(self.inputs, tangents)
        q, k, v = near_rows(q), near_rows(k), near_rows(v)
        self.uneven[0] |= _is_uneven(q) or _is_uneven(k)
        self.uneven[1] |= _is_uneven(v)
        of_heads = (self.heads(x) for x in (q, k, v))
        return Tangents(*of_heads, bias_of(bias), self.numbers(key_bias))

    def cotangents(self, grad_out, grad_lse):
        grad_out, grad_lse = kernels.cotangents_of(self.inputs, grad_out, grad_lse)
        grad_out = near_rows(grad_out)
        self.uneven[1] |= _is_uneven(grad_out)
        return grad_out, grad_lse

    def softmax(self, rows):
        """(shifts, sums); the CPU's kernels keep more (kernels.rows_kept)."""
        return [self.numbers(x) for x in rows[:2]]

    # ---- Launches

    def over_queries(self, kernel, name, *args):
        """A program for every block of queries of every head."""
        q, starts = self.inputs[0], self.fixed.q_starts
        sequences, longest = q.shape[0], q.shape[2]
        if starts is not None:
            sequences, longest = starts.shape[0] - 1, self.settings.longest_q

        def sized(configuration):
            blocks = -(-longest // configuration["QUERIES"])
            return blocks * sequences * q.shape[1], (*args, blocks)

        self._launch(kernel, name, sized)

    def over_keys(self, kernel, name, *args):
        """A program for every block of keys of every key head."""
        k, starts = self.inputs[1], self.fixed.k_starts
        sequences, longest = k.shape[0], k.shape[2]
        if starts is not None:
            sequences, longest = starts.shape[0] - 1, self.settings.longest_k

        def sized(configuration):
            blocks = -(-longest // configuration["KEYS"])
            return blocks * sequences * k.shape[1], (*args, blocks)

        self._launch(kernel, name, sized)

    def of_bias_tiles(self, kernel, name, *args):
        """The function that fills the gradient of a bias by a program for every tile of it."""
        return lambda grad: self._over_bias(kernel, name, grad, *args)

    def _over_bias(self, kernel, name, grad, *args):
        B, H, N, M = grad.shape
        sharing = self.inputs[0].shape[1] // max(1, H), self.inputs[0].shape[0] // max(1, B)

        def sized(configuration):
            tiles = -(-N // configuration["QUERIES"]) * -(-M // configuration["KEYS"])
            return tiles * B * H, (*args, bias_of(grad), H, *sharing)

        self._launch(kernel, name, sized)

    def turns(self, name, *parts):
        """The results of every launch of a kernel: those of all parts at once, or, where sums of
        several would not fit into registers (SPLIT), of one part after another."""
        if not self._configuration(name).get("SPLIT"):
            places = zip(*parts, strict=True)
            parts = [tuple(next((x for x in of if x is not None), None) for of in places)]
        return [part for part in parts if any(x is not None for x in part)]

    def _launch(self, kernel, name, sized):
        """`sized` gives the number of programs and the arguments for a configuration."""

        def run(configuration):
            programs, args = sized(configuration)
            if programs:
                constants = {**self.constants, **configuration}
                _triton.launch(kernel, (programs,), self.problem, *args, **constants)

        configuration = self._configuration(name)
        configuration.pop("SPLIT", None)
        q, k = self.inputs[:2]
        with _device.on_device(q):
            if tuning.is_wanted() and tuning.is_possible(q):
                # Calls alike: of the same constants, and sizes within a factor of two.
                sizes = [n.bit_length() for n in (q.shape[0] * q.shape[1], q.shape[2], k.shape[2])]
                kind = kernel, q.dtype, self.is_heavy, self.settings.right, *sizes
                kind += tuple(self.constants.values())
                configuration = tuning.fastest(kind, configuration, run)
            run(configuration)

    def _configuration(self, name):
        target, dtype = _triton.target(self.inputs[0]), self.inputs[0].dtype
        widest = max(self.constants["D"], self.constants["DV"])
        found = configurations.choose(name, target, dtype, widest, self.is_heavy)
        if all(self.uneven) and dtype.itemsize == 2 and _has_products_of_64_rows(target):
            # Triton 3.6 multiplies such tiles wrongly there, or reads beyond its memory (seen on
            # an H100): smaller ones go by the tensor cores' older instruction, which does not.
            found["QUERIES"] = min(found["QUERIES"], 32)
            found["KEYS"] = min(found["KEYS"], 32)
        return found


def near_rows(x):
    """The tensor, or where its rows lie too far apart for a tile a copy."""
    if (
        x is None
        or x.stride(2) // max(1, x.shape[3]) * configurations.FEATURES[-1] < _FARTHEST_ROWS
    ):
        return x
    return x.contiguous()


def _is_uneven(x):
    """Whether not all rows begin at multiples of 16: then nothing is copied in vectors."""
    return x is not None and (x.stride(2) % 16 != 0 or x.data_ptr() % 16 != 0)


def _has_products_of_64_rows(target):
    """Whether an instruction of the tensor cores multiplies tiles of 64 rows: wgmma, tcgen05."""
    return target.startswith("sm_") and 90 <= int(target.removeprefix("sm_")) < 120


def _padded(features):
    """As many columns as a tile of them has."""
    return max(16, 1 << (max(features, 1) - 1).bit_length())


def _as_numbers(mask):
    """The additive bias that hides what a boolean one does."""
    return torch.zeros_like(mask, dtype=torch.float64).masked_fill_(~mask, float("-inf"))


def _on(device, seed):
    """A seed drawn on the CPU moves without a wait."""
    return None if seed is None else seed.to(device, non_blocking=True)
