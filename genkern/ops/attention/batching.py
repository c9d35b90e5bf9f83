"""vmap's dimension folded into the batch of the four primitives, or of sequences into their rows.

A tensor's kind is a letter: q, k, v and h (like out) are [B, heads, rows, last]; m (a key bias) and
n (like lse) are [B, heads, rows]; r (the kept rows) is [how many, B, heads, rows]; b is a general
bias.
"""

import torch
from torch._C._functorch import TransformType, get_interpreter_stack

from genkern.ops._autograd import transforms_active
from genkern.ops.attention.arguments import OP

INPUT_KINDS = "qkvbm"
_BATCH = {"r": 1}  # the place of the batch in a tensor; 0 for the other kinds
_ROWS = {"r": 3}  # … and of the rows; 2 for the others


_NO_DROPOUT = (
    f"{OP}: dropout under torch.func.vmap is not supported: pass dropout_p=0.0, or the batch as a "
    f"leading dimension of q, k and v"
)


def refuse_dropout():
    """Before a seed is drawn, which vmap would refuse in other words."""
    stack = get_interpreter_stack() if transforms_active() else None
    if any(interpreter.key() == TransformType.Vmap for interpreter in stack or ()):
        raise NotImplementedError(_NO_DROPOUT)


class Fold:
    """`in_dims`: where vmap's dimension lies in each of the `tensors` (the inputs, those of Fixed,
    and the rest), None: nowhere."""

    def __init__(self, info, in_dims, tensors):
        q, bias, seed, starts = tensors[0], tensors[3], tensors[8], tensors[6]
        if seed is not None:
            raise NotImplementedError(_NO_DROPOUT)
        self.size, self.in_dims, self._tensors = info.batch_size, in_dims, tensors
        self.in_rows = starts is not None
        self.batch = next(n for i, n in enumerate(q.shape) if i != in_dims[0])
        self.bias_is_shared = bias is not None and self._moved(bias, in_dims[3]).shape[1] == 1

    def tensors(self, kinds):
        """The folded tensors; `kinds`: of those after the inputs and the constants."""
        inputs = self._folded(INPUT_KINDS, 0)
        key_lengths, q_starts, k_starts, _ = self._tensors[5:9]
        if key_lengths is not None:
            moved = self._moved(key_lengths, self.in_dims[5])
            key_lengths = moved.reshape(self.size * self.batch).contiguous()
        if self.in_rows:
            if self.in_dims[6] is not None or self.in_dims[7] is not None:
                raise NotImplementedError(
                    f"{OP}: cu_seqlens_q and cu_seqlens_k must be the same for all of "
                    f"torch.func.vmap's batch"
                )
            q_starts = self._repeated(q_starts, self._rows_of(0))
            k_starts = self._repeated(k_starts, self._rows_of(1))
        return *inputs, key_lengths, q_starts, k_starts, None, *self._folded(kinds, 9)

    def results(self, results, kinds):
        """Unfolded, and the places of vmap's dimension in them."""
        return tuple(self._unfold(x, k) for x, k in zip(results, kinds, strict=True)), (
            (0,) * len(results)
        )

    def _moved(self, x, dim):
        return x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)

    def _rows_of(self, place):
        return self._moved(self._tensors[place], self.in_dims[place]).shape[3]

    def _repeated(self, starts, rows):
        steps = rows * torch.arange(self.size, device=starts.device)[:, None]
        return torch.cat([starts[:1], (starts[1:] + steps).flatten()])

    def _folded(self, kinds, first):
        return [
            None
            if self._tensors[first + i] is None
            else self._fold(self._tensors[first + i], self.in_dims[first + i], kind)
            for i, kind in enumerate(kinds)
        ]

    def _fold(self, x, dim, kind):
        x = self._moved(x, dim)
        if kind == "b" and x.shape[1] != self.batch:
            x = x.expand(self.size, self.batch, *x.shape[2:])
        place = _ROWS.get(kind, 2) if self.in_rows else _BATCH.get(kind, 0)
        return x.movedim(0, place).flatten(place, place + 1)

    def _unfold(self, x, kind):
        place = _ROWS.get(kind, 2) if self.in_rows else _BATCH.get(kind, 0)
        x = x.unflatten(place, (self.size, x.shape[place] // max(1, self.size))).movedim(place, 0)
        if kind == "b" and self.bias_is_shared and self.batch != 1:
            x = x.sum(1, keepdim=True)
        return x
