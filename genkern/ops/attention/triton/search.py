"""Finds the configurations in configurations.txt: python -m genkern.ops.attention.triton.search

For every kernel, target, dtype and head dimension the first of a list of candidates, the largest
tiles first, that compiles without spills into the target's shared memory, whatever the call asks
for (`kinds`). No GPU takes part, so these are what fits, not what was measured to be fast
(`GENKERN_TRITON_AUTOTUNE=1` measures). Prints lines of configurations.txt; an argument picks lines
by their beginning ("sm_90 forward").
"""

import itertools
import sys
from typing import NamedTuple

import torch

from genkern.assembly import TARGETS, compiled
from genkern.ops._triton import recording
from genkern.ops.attention.arguments import NOTHING_FIXED, Fixed, Settings
from genkern.ops.attention.choice import WIDEST_FP64
from genkern.ops.attention.triton import configurations, launch
from genkern.ops.attention.triton.operands import WIDEST as WHOLE

DTYPES = {"half": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
KERNELS = {
    "forward": ("forward",),
    "backward": ("backward_rows", "backward_columns", "bias_gradient"),
    "jvp": ("jvp",),
    "second": ("second_stats", "second_rows", "second_columns", "second_bias"),
}
# Of the kernels that multiply rows in pieces where they are wide: the features of a piece.
IN_PIECES = *KERNELS["jvp"], *KERNELS["second"]
PIECES = {"half": (WHOLE, 64, 32), "fp32": (32, 16), "fp64": (32, 16)}
# (queries, keys, warps); a sweep over queries has its tiles the other way round.
HALF = [(128, 128, 8), (128, 64, 4), (128, 64, 8), (128, 32, 8), (64, 64, 4), (64, 64, 8)]
HALF += [(64, 32, 4), (64, 32, 8), (64, 16, 4), (32, 32, 4), (32, 32, 8), (32, 16, 8), (16, 16, 4)]
HALF += [(16, 16, 8)]
FP32 = [(64, 64, 8), (64, 32, 8), (32, 32, 8), (32, 32, 4), (32, 16, 8), (16, 16, 4), (16, 16, 8)]
FP64 = [(32, 32, 8), (16, 16, 4), (16, 16, 8)]
TILES = {"half": HALF, "fp32": FP32, "fp64": FP64}
STAGES = {"half": (3, 2, 1), "fp32": (2, 1), "fp64": (2, 1)}
# Lines' targets, and what they are compiled for.
LINES = [(target, "half", (target,)) for target in TARGETS]
LINES += [("gfx942", "fp32", ("gfx942",)), ("gfx942", "fp64", ("gfx942",))]
LINES += [("nvidia", dtype, ("sm_120",)) for dtype in ("fp32", "fp64")]
# Of these only lines where the one of "nvidia" does not fit.
LINES += [(f"sm_{n}", dtype, (f"sm_{n}",)) for n in (80, 90, 100) for dtype in ("fp32", "fp64")]


def candidates(name, target, dtype, features, is_heavy):
    largest, pieces, splits, stages = 128 * 128, (WHOLE,), (False,), STAGES[dtype]
    if name in IN_PIECES:
        # More products at a time: what is larger was found to spill, always.
        largest = 32 * 32 if features > 128 else 64 * 32 if is_heavy else 128 * 64
        if dtype != "half":
            largest = 16 * 16 if features > 128 else 32 * 16
        pieces = dict.fromkeys(x if x < features else WHOLE for x in PIECES[dtype])
        stages = stages[-2:]
        if name in ("second_rows", "second_columns"):
            splits = (False, True) if largest <= 32 * 32 else (False,)
    if not target.startswith("sm_"):
        stages = 2, 1
    for queries, keys, warps in TILES[dtype]:
        if queries * keys > largest:
            continue
        if name.endswith("_columns"):
            queries, keys = keys, queries
        for split, piece, depth in itertools.product(splits, pieces, stages):
            sizes = f"{queries}x{keys}/{warps}/{depth}" + f"/{piece}" * (piece != WHOLE)
            yield configurations.parsed(sizes + "s" * split)


class Kind(NamedTuple):
    """A call that makes other code of a kernel than the others do."""

    d: int
    dv: int
    N: int = 256
    fixed: Fixed = NOTHING_FIXED
    settings: Settings = Settings(0.1)
    biases: bool = False


def kinds(features, is_heavy):
    """With and without a mask, lengths of which nothing is known, rows of v that are narrower or
    wider than those of k; is_heavy: softcap, dropout, biases, all at once first."""
    sizes = (features, features), (features, features // 2), (features // 2, features)
    causal, lengths = Settings(0.1, right=0), Fixed(key_lengths=torch.ones(2, dtype=torch.int64))
    seeded = Fixed(seed=torch.tensor(2**40))
    if not is_heavy:
        yield Kind(features, features, settings=causal)
        yield Kind(features, features, N=203)
        for d, dv in sizes:
            yield Kind(d, dv)
            yield Kind(d, dv, fixed=lengths)
        return
    everything = Settings(0.1, softcap=5.0, dropout_p=0.1, left=100, right=0)
    for d, dv in sizes:
        fixed = Fixed(key_lengths=lengths.key_lengths, seed=seeded.seed)
        yield Kind(d, dv, fixed=fixed, settings=everything, biases=True)
    yield Kind(features, features, settings=Settings(0.1, softcap=5.0))
    yield Kind(features, features, fixed=seeded, settings=Settings(0.1, dropout_p=0.1))
    yield Kind(features, features, settings=causal, biases=True)
    yield Kind(features, features, N=203, biases=True)


def launches(name, target, dtype, kind, configuration):
    """Those of one kernel in this configuration."""
    choose, configurations.choose = configurations.choose, lambda *_: dict(configuration)
    try:
        with recording(target) as recorded:
            _call(name, dtype, kind)
    finally:
        configurations.choose = choose
    return [x for x in recorded if x.kernel.__name__ == f"attention_{name}"]


def _call(name, dtype, kind):
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    d, dv, N = kind.d, kind.dv, kind.N

    def make(heads, features):
        return torch.empty(2, heads, N, features, dtype=dtype)

    def inputs():
        biases = (None, None)
        if kind.biases:
            biases = torch.empty(1, 4, N, N, dtype=sums), torch.empty(2, 2, N, dtype=sums)
        return make(4, d), make(2, d), make(2, dv), *biases

    rows = torch.empty(2, 2, 4, N, dtype=sums)
    cotangents = make(4, dv), rows[0] if kind.biases else None
    call = inputs(), kind.fixed, kind.settings
    if name == "forward":
        launch.forward(*call, True)
    elif name == "jvp":
        launch.jvp(*call, rows, inputs())
    elif name in KERNELS["backward"]:
        launch.backward(*call, rows, *cotangents)
    else:
        launch.second(*call, rows, *cotangents, inputs())


def search(name, targets, dtype, features, is_heavy):
    """The configuration, or None where no candidate fits on all targets."""
    spilled = None
    for configuration in candidates(name, targets[0], dtype, features, is_heavy):
        tile = configurations.printed({**configuration, "num_stages": 0})
        if tile == spilled:
            continue  # fewer stages would save a few registers, not so many
        for target, kind in itertools.product(targets, kinds(features, is_heavy)):
            arguments = target, DTYPES[dtype], kind, configuration
            found = [compiled(one, target) for one in launches(name, *arguments)]
            if any(one.spills > 200 for one in found):
                spilled = tile
            if any(one.spills or one.shared_bytes > TARGETS[target] for one in found):
                break
        else:
            return configuration
    return None


def main(wanted=""):
    for target, dtype, compiled_for in LINES:
        for name in [name for names in KERNELS.values() for name in names]:
            for is_heavy in (True,) if "bias" in name else (False, True):
                line = f"{target} {name}{'+' * is_heavy} {dtype}"
                if not line.startswith(wanted):
                    continue
                row = [
                    search(name, compiled_for, dtype, features, is_heavy)
                    for features in configurations.FEATURES
                    if dtype != "fp64" or features <= WIDEST_FP64
                ]
                row += [None] * (len(configurations.FEATURES) - len(row))
                columns = ["-" if x is None else configurations.printed(x) for x in row]
                print(f"{line:32}" + " ".join(f"{x:13}" for x in columns).rstrip(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
