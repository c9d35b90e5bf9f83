"""Run as a script by test_spectral_norm_distributed.py: two gloo ranks each train some steps.

    python spectral_norm_on_two_ranks.py FOLDER

Of FOLDER it reads nothing; every rank writes `{mode}{rank}.pt`: parameters, buffers and which
calls there were.
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
STEPS = 3
MODES = ("ddp_broadcast", "ddp", "ddp_r1", "fsdp", "fsdp_r1")


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.logit = nn.Linear(4, 1)

    def forward(self, images):
        for layer in (self.first, self.second, self.up):
            images = torch.tanh(layer(images))
        return self.logit(images.mean((2, 3))).squeeze(1)


class Loss(nn.Module):
    """A discriminator's hinge loss: two forwards and, with `penalty`, R1 inside the forward (see
    attention_on_two_ranks.py)."""

    def __init__(self, model, penalty):
        super().__init__()
        self.model, self.penalty = model, penalty

    def forward(self, real, fake):
        real = real.clone().requires_grad_()
        logits = self.model(real)
        loss = genkern.losses.hinge.d(logits, self.model(fake))
        if self.penalty:
            (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
            loss = loss + slope.square().sum((1, 2, 3)).mean()
        return loss


def model_and_images():
    torch.manual_seed(0)
    model = genkern.spectral_norm(Discriminator().double(), recurse=True)
    shape = 2, STEPS, RANKS * IMAGES_A_RANK, 2, 5, 5
    return model, torch.randn(shape, dtype=torch.float64)


def train(loss, images, rank=None):
    """`STEPS` steps on this rank's images, or on all; gives what is then to be compared."""
    optimizer = torch.optim.Adam(loss.parameters(), 0.01, fused=True)
    with genkern.explain() as log:
        for real, fake in zip(*images, strict=True):
            if rank is not None:
                real, fake = real.chunk(RANKS)[rank], fake.chunk(RANKS)[rank]
            optimizer.zero_grad()
            loss(real, fake).backward()
            optimizer.step()
    state = {
        name.removeprefix("module."): _whole(value) for name, value in loss.state_dict().items()
    }
    calls = [choice for choice in log if choice.op == "spectral_norm"]
    assert {choice.backend for choice in calls} == {"cpu"}, log
    return {"state": state, "calls": len(calls)}


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wrapped(mode, mesh):
    """The loss as two ranks train it."""
    loss = Loss(copy.deepcopy(model_and_images()[0]), penalty=mode.endswith("r1"))
    if mode.startswith("ddp"):
        return DistributedDataParallel(loss, broadcast_buffers=mode == "ddp_broadcast")
    if not loss.penalty:
        for layer in loss.model.children():
            fully_shard(layer, mesh=mesh)
    return fully_shard(loss, mesh=mesh)


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    images = model_and_images()[1]
    for mode in MODES:
        torch.save(train(wrapped(mode, mesh), images, rank), Path(folder) / f"{mode}{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(rank_main, (sys.argv[1],), nprocs=RANKS)
