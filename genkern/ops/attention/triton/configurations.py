"""Sizes of tiles, warps and stages of Triton's attention kernels, by target and head dimension."""


def choose(name, target, dtype, features):
    return {"QUERIES": 64, "KEYS": 32, "num_warps": 4, "num_stages": 2}
