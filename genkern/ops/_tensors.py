"""What every op.py needs to know of a tensor before its address may reach a kernel."""

import torch
from torch import Tensor

# csrc/common/dtype.h
DTYPE_NUMBER = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Results that are sums (losses, logsumexp, sigma) and everything computed on the way.
ARITHMETIC = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

# A buffer object is as plain as a parameter; older torch has no class for it.
PLAIN = {Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", Tensor)}


def is_plain(tensor):
    """Whether the eager path may take this tensor: an ordinary one on a device with memory. Others
    (FakeTensor, meta, subclasses) go by torch.library, which knows what to do with them."""
    return type(tensor) in PLAIN and (tensor.is_cpu or tensor.is_cuda)


def is_ordinary(tensor):
    """Whether the elements are what lies at the tensor's address."""
    return type(tensor) in PLAIN and not (tensor.is_neg() or tensor._is_zerotensor())


def is_ready(tensor):
    """Whether a CPU kernel may read this tensor as a flat array just as it is."""
    return (
        type(tensor) in PLAIN
        and tensor.is_cpu
        and tensor.is_contiguous()
        and tensor.dtype in DTYPE_NUMBER
        and not (tensor.is_neg() or tensor._is_zerotensor())
    )


def materialized(op, name, tensor):
    """The tensor, fit to be read through its address.

    Lazy negation and zero-tensors are resolved by a copy; a tensor that holds no memory of its own
    (DTensor, FakeTensor, other subclasses) is refused with a TypeError.
    """
    if is_ordinary(tensor):
        return tensor
    if type(tensor) not in PLAIN:
        raise TypeError(
            f"{op}: {name} is a {type(tensor).__name__}, and the kernels read plain tensors "
            f"only: pass its local or materialised tensor"
        )
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_neg()


def check_floating(op, **tensors):
    """Raises TypeError or ValueError unless all are floating tensors of one dtype and device."""
    first_name, first = None, None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, not {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be of a floating-point dtype, not {tensor.dtype}")
        if first is None:
            first_name, first = name, tensor
        elif tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must have {first_name}'s dtype, {first.dtype}, not {tensor.dtype}"
            )
        elif tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on {first_name}'s device, {first.device}, not "
                f"{tensor.device}"
            )


def with_dense_samples(tensor):
    """The tensor [B, …] itself where each sample's elements lie side by side in some order
    (contiguous or channels_last, samples anywhere), else a contiguous copy."""
    if tensor.is_contiguous():
        return tensor
    shape, strides = tensor.shape[1:], tensor.stride()[1:]
    if _packed(shape, strides):
        return tensor
    if len(shape) > 1 and _packed((*shape[1:], shape[0]), (*strides[1:], strides[0])):
        return tensor
    return tensor.contiguous()


def _packed(shape, strides):
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def common_rows(tensors):
    """(rows, size, [row strides]) where these tensors of one shape can be walked together as rows
    of elements that lie side by side, else None. Contiguous tensors are one row; halves of a
    channels_last image, say, have a row a pixel."""
    shape = tensors[0].shape
    if all(x.is_contiguous() for x in tensors):
        return 1, shape.numel(), [0] * len(tensors)
    order = sorted(range(len(shape)), key=tensors[0].stride, reverse=True)
    merged = []  # (size, strides of all tensors), outermost last
    for dim in reversed(order):
        size, strides = shape[dim], [x.stride(dim) for x in tensors]
        if size == 1:
            continue
        if merged and all(
            s == merged[-1][0] * inner for s, inner in zip(strides, merged[-1][1], strict=True)
        ):
            merged[-1] = merged[-1][0] * size, merged[-1][1]
        else:
            merged.append((size, strides))
    if not merged or len(merged) > 2 or any(s != 1 for s in merged[0][1]):
        return None
    rows, strides = merged[1] if len(merged) == 2 else (1, [0] * len(tensors))
    return rows, merged[0][0], strides
