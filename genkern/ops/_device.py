"""What the ops share of a GPU, whichever backend launches there: the device, its current stream,
tables of numbers."""

import contextlib

import torch


def on_device(tensor):
    """A `with` in which launches go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def stream(tensor):
    """The address of the current stream of the tensor's device, 0 on the CPU; to be asked for
    inside the op, never when it is traced."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


# A captured CUDA graph reads its tables again at every replay.
_tables_of_graphs = []


def device_table(rows, device):
    """The int64 numbers (addresses, sizes, counters, …) as a tensor on the device, which kernels
    may write; without waiting for it."""
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")  # whatever the default is
    if device.type != "cuda":
        return torch.empty_like(table).copy_(table)  # what the executor lets kernels write
    table = table.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _tables_of_graphs.append(table)
    return table.to(device, non_blocking=True)
