"""Run as a script by test_attention_distributed.py: two gloo ranks each train a step.

    python attention_on_two_ranks.py FOLDER

Of FOLDER it reads nothing; every rank writes `{mode}{rank}.pt`, the gradients that it ends with.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import genkern

RANKS = 2
IMAGES_A_RANK = 2


class Model(nn.Module):
    """Every attention module of genkern.nn, one after another: images to logits."""

    def __init__(self):
        super().__init__()
        self.pixels = genkern.nn.SelfAttention2d(8)
        self.distances = genkern.nn.L2SelfAttention2d(8, heads=2, dim_head=3)
        self.tokens = genkern.nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.logit = nn.Linear(8, 1)
        nn.init.constant_(self.pixels.gamma, 0.5)

    def forward(self, images):
        x = self.pixels(images)
        x = (x + self.distances(x)).flatten(2).mT
        return self.logit(self.tokens(x, x, x, need_weights=False)[0]).mean((1, 2))


def model_and_images():
    torch.manual_seed(0)
    model = Model().double()
    return model, torch.randn(RANKS * IMAGES_A_RANK, 8, 4, 4, dtype=torch.float64)


class Loss(nn.Module):
    """The mean over images, so that the ranks' mean is the whole batch's; `penalty` adds R1.

    The penalty is taken inside the forward: FSDP2 frees the weights and ends its work at the first
    backward through a module that it wraps (with torch 2.13 a penalty outside leaves any model, of
    torch's own layers too, without gradients)."""

    def __init__(self, model, penalty):
        super().__init__()
        self.model, self.penalty = model, penalty

    def forward(self, images):
        images = images.clone().requires_grad_()
        logits = self.model(images)
        loss = nn.functional.softplus(-logits).mean()
        if self.penalty:
            (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
            loss = loss + slope.square().sum((1, 2, 3)).mean()
        return loss


def gradients(model):
    named = ((name.removeprefix("module."), p.grad) for name, p in model.named_parameters())
    return {name: _whole(grad) for name, grad in named}


def _whole(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    model, images = model_and_images()
    mine = images.chunk(RANKS)[rank]

    def step(mode, loss):
        with genkern.explain() as log:
            loss(mine).backward()
        assert {choice.backend for choice in log} == {"cpu"}, log
        torch.save(gradients(loss), Path(folder) / f"{mode}{rank}.pt")

    mesh = init_device_mesh("cpu", (RANKS,))
    for suffix, penalty in (("", False), ("_r1", True)):
        loss = Loss(model, penalty)
        step("ddp" + suffix, DistributedDataParallel(copy.deepcopy(loss)))
        sharded = copy.deepcopy(loss)
        if not penalty:
            for module in sharded.model.children():
                fully_shard(module, mesh=mesh)
        step("fsdp" + suffix, fully_shard(sharded, mesh=mesh))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(rank_main, (sys.argv[1],), nprocs=RANKS)
