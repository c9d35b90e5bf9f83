"""What the CUDA kernels share that read lists of flat arrays in one launch: csrc/common/lists.h."""

import torch

from genkern.ops._device import device_table

BLOCKS_AIM = 2048  # with fewer a big GPU is not full; with many more the last one adds long


def on_the_device(plan, like):
    """(the plan's table, its blocks' partial sums), for one launch or several in a row."""
    partials = like.new_empty(plan.sums * plan.blocks, dtype=torch.float64)
    return device_table(plan.table, like.device), partials
