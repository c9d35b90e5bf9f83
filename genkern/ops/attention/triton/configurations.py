"""Sizes of tiles, warps and stages of Triton's attention kernels, by target and head dimension.

configurations.txt has a line for every kernel and dtype of a target, with columns for heads of up
to 64, 128 and 256 features: `128x64/8/3` means tiles of 128 queries and 64 keys, 8 warps, 3 stages;
a trailing `s` that a launch for several results is split into one for each. A kernel's name ends
with + in the line for softcap, dropout or biases, which need more registers. search.py finds them.
"""

import functools
from pathlib import Path

import torch

FEATURES = (64, 128, 256)
DTYPES = {
    torch.float16: "half",
    torch.bfloat16: "half",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
# In the interpreter a step costs the same for a tile of any size.
_INTERPRETED = {"QUERIES": 64, "KEYS": 64, "num_warps": 4, "num_stages": 1}


def choose(name, target, dtype, features, is_heavy):
    """The configuration of a kernel for heads padded to so many features. is_heavy: with softcap,
    dropout or biases."""
    if target == "interpreter":
        return dict(_INTERPRETED)
    line = target_of_line(target, DTYPES[dtype]), name + "+" * is_heavy, DTYPES[dtype]
    column = next(i for i, most in enumerate(FEATURES) if features <= most)
    return dict(_table()[line][column])


def target_of_line(target, dtype):
    """The target in the table whose instructions and shared memory a GPU has."""
    if not target.startswith("sm_"):
        return "gfx942"
    if dtype != "half":
        return "nvidia"
    capability = int(target.removeprefix("sm_"))
    if capability < 90:
        return "sm_80" if capability in (80, 87) else "sm_120"  # of 163 KiB, or of 99
    return f"sm_{min(capability // 10, 12) * 10}" if capability // 10 in (9, 10, 12) else "sm_120"


@functools.cache
def _table():
    table = {}
    for line in (Path(__file__).parent / "configurations.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            target, name, dtype, *columns = line.split()
            table[target, name, dtype] = [parsed(column) for column in columns]
    return table


def parsed(column):
    split = {"SPLIT": True} if column.endswith("s") else {}
    tile, warps, stages = column.rstrip("s").split("/")
    queries, keys = tile.split("x")
    sizes = {"QUERIES": int(queries), "KEYS": int(keys)}
    return {**sizes, "num_warps": int(warps), "num_stages": int(stages), **split}


def printed(configuration):
    """What `parsed` reads."""
    queries, keys, warps, stages = (
        configuration[key] for key in ("QUERIES", "KEYS", "num_warps", "num_stages")
    )
    return f"{queries}x{keys}/{warps}/{stages}" + "s" * configuration.get("SPLIT", False)
