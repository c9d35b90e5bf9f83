"""The cross-entropy of a linear layer, a chunk of tokens at a time.

torch's GEMM makes a chunk's logits in a buffer that all chunks share, our kernel turns them in
place into losses and the gradient of the logits, and torch's GEMMs turn that into the layer's. A
loss that is one number needs its gradients scaled only, by a number that comes later: so they are
made in the forward's pass, for three GEMMs in all. A loss for each token is computed again.
"""

import torch

from genkern._native import native
from genkern.ops._tensors import ARITHMETIC, DTYPE_NUMBER
from genkern.ops.linear_cross_entropy.reference import reduce

# Bytes of a chunk's logits, by those of one: smaller chunks make GEMMs slower (500 tokens of 32,000
# fp32 logits fit here), larger ones gain nothing. Half precision is held to half the memory.
CHUNK_BYTES = {8: 1 << 27, 4: 1 << 26, 2: 1 << 24}
LEAST_TOKENS = 32
WEIGHT_ROWS = 2048  # of the weight's gradient at once, where it goes through half precision


def forward(input, weight, bias, target, options):
    losses = _losses(input)
    for chunk in _chunks(input, weight, bias):
        _kernel(chunk, target, options, losses, gradient=False)
    return reduce(losses, target != options.ignore_index, options.reduction)


def forward_with_gradients(input, weight, bias, target, options, wanted):
    """The loss, and its gradients with the number that they still lack (see `scaled`)."""
    losses, counted = _losses(input), target != options.ignore_index
    factor = 1.0
    if options.reduction == "mean":
        tokens = counted.sum().item()
        factor = 1 / tokens if tokens else float("nan")
    # In half precision the gradient of a logit may be too small for its type if scaled here.
    scale, factor = (factor, 1.0) if input.element_size() >= 4 else (1.0, factor)
    gradients = _Gradients(input, weight, bias, wanted)
    for chunk in _chunks(input, weight, bias):
        _kernel(chunk, target, options, losses, gradient=True, scale=scale)
        gradients.add(chunk)
    return reduce(losses, counted, options.reduction), (gradients.finish(), factor)


def backward(input, weight, bias, target, options, grad_loss, wanted):
    """The gradients of a loss of which nothing was kept."""
    scales = grad_loss.to(ARITHMETIC[input.dtype]).expand(target.shape)
    if options.reduction == "mean":
        scales = scales / (target != options.ignore_index).sum()
    scales, losses = scales.contiguous(), _losses(input)
    gradients = _Gradients(input, weight, bias, wanted)
    for chunk in _chunks(input, weight, bias):
        _kernel(chunk, target, options, losses, gradient=True, scales=scales)
        gradients.add(chunk)
    return [None if x is None else x.to(input.dtype) for x in gradients.finish()]


def scaled(gradients, grad_loss, dtype):
    """The gradients of `forward_with_gradients` times what they lack, multiplied in fp32. They are
    changed in place: nobody else holds them."""
    gradients, factor = gradients
    factor = grad_loss.item() * factor
    result = []
    for gradient in gradients:
        if gradient is not None and factor != 1:
            gradient.mul_(factor)  # by a number: in fp32, rounded once
        result.append(None if gradient is None else gradient.to(dtype))
    return result


class _Chunk:
    """Tokens begin … end: `input` their rows, `logits` [tokens, V] in the shared buffer."""

    def __init__(self, begin, input, weight, logits):
        self.begin, self.end = begin, begin + len(input)
        self.input, self.weight, self.logits = input, weight, logits


def _losses(input):
    return input.new_empty(len(input), dtype=ARITHMETIC[input.dtype])


def _chunks(input, weight, bias):
    tokens, classes = len(input), len(weight)
    size = CHUNK_BYTES[input.element_size()] // (input.element_size() * max(1, classes))
    size = min(max(size // LEAST_TOKENS, 1) * LEAST_TOKENS, tokens)
    buffer = input.new_empty(size, classes)
    for begin in range(0, tokens, max(1, size)):
        rows = input[begin : begin + size]
        logits = buffer[: len(rows)]
        with torch.autocast(input.device.type, enabled=False):
            if bias is None:
                torch.mm(rows, weight.mT, out=logits)
            else:
                torch.addmm(bias, rows, weight.mT, out=logits)
        yield _Chunk(begin, rows, weight, logits)


def _kernel(chunk, target, options, losses, *, gradient, scales=None, scale=1.0):
    logits = chunk.logits
    size = losses.element_size()
    native.token_losses(
        logits.data_ptr(),
        *logits.shape,
        target.data_ptr() + chunk.begin * target.element_size(),
        options.ignore_index,
        options.label_smoothing,
        options.softcap,
        options.z_loss,
        DTYPE_NUMBER[logits.dtype],
        losses.data_ptr() + chunk.begin * size,
        gradient,
        0 if scales is None else scales.data_ptr() + chunk.begin * size,
        scale,
        torch.get_num_threads(),
    )


class _Gradients:
    """Of input, weight and bias, growing chunk by chunk; those of weight and bias in fp32."""

    def __init__(self, input, weight, bias, wanted):
        wide = ARITHMETIC[input.dtype]
        self.input = torch.empty_like(input, memory_format=torch.contiguous_format)
        self.input = self.input if wanted[0] else None
        self.weight = weight.new_zeros(weight.shape, dtype=wide) if wanted[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=wide) if wanted[2] else None

    def add(self, chunk):
        gradient = chunk.logits
        with torch.autocast(gradient.device.type, enabled=False):
            if self.input is not None:
                torch.mm(gradient, chunk.weight, out=self.input[chunk.begin : chunk.end])
            if self.bias is not None:
                self.bias += gradient.sum(0, dtype=self.bias.dtype)
            if self.weight is None:
                return
            if self.weight.dtype == gradient.dtype:
                self.weight.addmm_(gradient.mT, chunk.input)
                return
            for begin in range(0, gradient.shape[1], WEIGHT_ROWS):
                part = gradient[:, begin : begin + WEIGHT_ROWS]
                self.weight[begin : begin + WEIGHT_ROWS] += part.mT @ chunk.input

    def finish(self):
        return [self.input, self.weight, self.bias]
