"""Sizes of tiles, warps and stages of Triton's attention kernels, by target and head dimension.

configurations.txt has a line for every kernel and dtype of a target, with columns for heads of up
to 64, 128 and 256 features: `128x64/8/3` means tiles of 128 queries and 64 keys, 8 warps, 3 stages;
a fourth number that rows are multiplied in pieces of so many features (operands.py), a trailing `s`
that a launch for several results is split into one for each; `-`: heads that go to another backend.
A kernel's name ends with + in the line for softcap, dropout or biases, which need more registers.
Lines of "nvidia" are for every sm_ that has none of its own. search.py finds them.
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
    like, end = target_of_line(target), (name + "+" * is_heavy, DTYPES[dtype])
    row = _table().get((like, *end)) or _table()[("nvidia", *end)]
    column = next(i for i, most in enumerate(FEATURES) if features <= most)
    return dict(row[column])


def target_of_line(target):
    """The target in the table whose instructions and shared memory a GPU has."""
    if not target.startswith("sm_"):
        return "gfx942"
    capability = int(target.removeprefix("sm_"))
    if capability < 90:
        return "sm_80" if capability in (80, 87) else "sm_120"  # of 163 KiB, or of 99
    major = capability // 10
    return f"sm_{major * 10}" if major in (9, 10) else "sm_120"


@functools.cache
def _table():
    table = {}
    for line in (Path(__file__).parent / "configurations.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            target, name, dtype, *columns = line.split()
            table[target, name, dtype] = [parsed(column) for column in columns if column != "-"]
    return table


def parsed(column):
    split = {"SPLIT": True} if column.endswith("s") else {}
    tile, warps, stages, *piece = column.rstrip("s").split("/")
    queries, keys = tile.split("x")
    pieces = {"PIECE": int(piece[0])} if piece else {}
    sizes = {"QUERIES": int(queries), "KEYS": int(keys), **pieces}
    return {**sizes, "num_warps": int(warps), "num_stages": int(stages), **split}


def printed(configuration):
    """What `parsed` reads."""
    queries, keys, warps, stages = (
        configuration[key] for key in ("QUERIES", "KEYS", "num_warps", "num_stages")
    )
    piece = f"/{configuration['PIECE']}" if "PIECE" in configuration else ""
    return f"{queries}x{keys}/{warps}/{stages}{piece}" + "s" * configuration.get("SPLIT", False)
