"""Launches of the CUDA attention kernels: the functions of kernels.py, with the same results."""

import torch

from genkern._native import native
from genkern.ops._device import on_device, stream
from genkern.ops.attention import bias_sums, kernels
from genkern.ops.attention.arguments import check_longest


def forward(inputs, fixed, settings, want_lse):
    """(out [B, H, N, dv], lse [B, H, N] or None, rows)"""
    call = Call(inputs, fixed, settings)
    q, _, v, _, _ = call.inputs
    out = kernels.laid_out_like(q, v.shape[3])
    lse = kernels.new_row_numbers(q) if want_lse else None
    rows = kernels.new_rows(q)
    call.launch(
        native.attention_forward_cuda, call.heads(out), *call.planes(rows), call.numbers(lse)
    )
    return out, lse, rows


def backward(inputs, fixed, settings, rows, grad_out, grad_lse, wanted=kernels.ALL):
    """Gradients of the five inputs, each in its input's dtype."""
    call = Call(inputs, fixed, settings)
    grad_out, grad_lse = kernels.cotangents_of(call.inputs, grad_out, grad_lse)
    grads = kernels.new_gradients(call.inputs, wanted)
    sums = bias_sums.new_column_sums(call.inputs, grads)
    facts, cotangent = call.planes(call.new_facts(3)), call.heads(grad_out)
    call.launch(
        native.attention_backward_rows_cuda,
        *call.planes(rows[:2]),
        cotangent,
        call.numbers(grad_lse),
        call.heads(grads[0]),
        facts,
    )
    if any(x is not None for x in (grads[1], grads[2], sums)):
        call.launch(
            native.attention_backward_columns_cuda,
            facts,
            cotangent,
            call.heads(grads[1]),
            call.heads(grads[2]),
            call.numbers(sums),
        )

    def of_tiles(grad):
        sizes = grad.shape[:2]
        launcher = native.attention_bias_gradient_cuda
        call.launch(launcher, facts, cotangent, kernels.bias_gradient_address(grad), *sizes)

    row_sums = None if grad_lse is None else torch.where(rows[1] > 0, grad_lse, 0)
    bias_sums.finish(call.inputs, grads, sums, row_sums, of_tiles)
    return kernels.in_dtypes_of(call.inputs, grads)


def second(inputs, fixed, settings, rows, grad_out, grad_lse, tangents, wanted=(True,) * 7):
    """The gradients of ⟨backward's results, tangents⟩ for the inputs, grad_out and grad_lse."""
    call = Call(inputs, fixed, settings)
    grad_out, grad_lse = kernels.cotangents_of(call.inputs, grad_out, grad_lse)
    grads = kernels.new_gradients(call.inputs, wanted[:5])
    of_out = kernels.laid_out_like(grad_out, call.inputs[2].shape[3]) if wanted[5] else None
    sums = bias_sums.new_column_sums(call.inputs, grads)
    shift, inverse, level, rho = call.planes(call.new_facts(4))
    taus = kernels.new_row_numbers(call.inputs[0])  # a result, so in memory of its own
    facts = shift, inverse, level, call.numbers(taus), rho
    tangents, cotangent = call.tangents(tangents), call.heads(grad_out)
    call.launch(
        native.attention_second_rows_cuda,
        *call.planes(rows[:2]),
        tangents,
        cotangent,
        call.numbers(grad_lse),
        call.heads(grads[0]),
        call.heads(of_out),
        facts,
    )
    known = facts, tangents, cotangent
    if any(x is not None for x in (grads[1], grads[2], sums)):
        call.launch(
            native.attention_second_columns_cuda,
            *known,
            call.heads(grads[1]),
            call.heads(grads[2]),
            call.numbers(sums),
        )

    def of_tiles(grad):
        sizes = grad.shape[:2]
        launcher = native.attention_second_bias_cuda
        call.launch(launcher, *known, kernels.bias_gradient_address(grad), *sizes)

    bias_sums.finish(call.inputs, grads, sums, None, of_tiles)
    return *kernels.in_dtypes_of(call.inputs, grads), of_out, taus if wanted[6] else None


def jvp(inputs, fixed, settings, rows, tangents):
    """The derivatives of out and lse along the tangents of the inputs."""
    call = Call(inputs, fixed, settings)
    q, _, v, _, _ = call.inputs
    out, lse = kernels.laid_out_like(q, v.shape[3]), kernels.new_row_numbers(q)
    call.launch(
        native.attention_jvp_cuda,
        *call.planes(rows[:2]),
        call.tangents(tangents),
        call.heads(out),
        call.numbers(lse),
    )
    return out, lse


class Call:
    """What the launches of one pass share."""

    def __init__(self, inputs, fixed, settings):
        self.inputs = kernels.readable_inputs(inputs)
        q = self.inputs[0]
        if fixed.seed is not None:  # drawn on the CPU it moves without a wait
            fixed = fixed._replace(seed=fixed.seed.to(q.device, non_blocking=True))
        self.fixed = fixed
        settings = check_longest(self.inputs, fixed, settings)
        N, M = q.shape[2], self.inputs[1].shape[2]
        longest = N, M
        if fixed.q_starts is not None:
            longest = settings.longest_q, settings.longest_k
        self.problem = kernels.problem_arguments(self.inputs, fixed, settings, 0, N, M)
        self.seed_and_longest = 0 if fixed.seed is None else fixed.seed.data_ptr(), *longest

    def launch(self, launcher, *args):
        q = self.inputs[0]
        with on_device(q):
            launcher(self.problem, *args, (*self.seed_and_longest, stream(q)))

    def heads(self, x):
        return kernels.heads_address(x, self.fixed)

    def numbers(self, x):
        return kernels.numbers_address(x, self.fixed)

    def tangents(self, tangents):
        """Their addresses. The tensors live as long as the call, for the launches to read."""
        self.along = kernels.readable_tangents(self.inputs, tangents)
        return kernels.tangent_addresses(self.along, self.inputs, self.fixed)

    def planes(self, x):
        """The addresses of the first dimension's planes, [B, H, N] each."""
        plane, batch, head, _ = x.stride()
        first, step = x.data_ptr(), plane * x.element_size()
        batch = batch if self.fixed.q_starts is None else 0
        return tuple((first + i * step, batch, head) for i in range(x.shape[0]))

    def new_facts(self, kinds):
        """Memory for what a pass by rows tells the others. It lives as long as the call: freed
        before the last launch, it would be the next result's."""
        q = self.inputs[0]
        self.facts = q.new_empty((kinds, *q.shape[:3]), dtype=torch.float32)
        return self.facts
