"""What the CUDA kernels share that read lists of flat arrays in one launch: csrc/common/lists.h."""

import torch

from genkern.ops._device import device_table

BLOCKS_AIM = 1024  # with fewer a big GPU is not full; with many more the last one adds long

# By device and stream: launches on one stream come one after another, and each leaves a zero.
_counters = {}


class ListMemory:
    """What a launch of this plan needs on the device of the tensor `like`, to be kept until it is
    launched; `addresses` as the contract's ListMemory has them."""

    def __init__(self, plan, like, stream):
        self.table = device_table(plan.table, like.device) if plan.needs_table else None
        self.counter = self.partials = None
        if plan.sums:
            self.counter = _counter(like, stream)
            self.partials = like.new_empty(plan.sums * plan.blocks, dtype=torch.float64)
        tensors = self.table, self.counter, self.partials
        self.addresses = [0 if x is None else x.data_ptr() for x in tensors]


def _counter(like, stream):
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return like.new_zeros(1, dtype=torch.int64)  # a graph may be replayed on any stream
    key = like.device, stream
    if key not in _counters:
        _counters[key] = like.new_zeros(1, dtype=torch.int64)
    return _counters[key]
