"""The gathered facts as Markdown."""

from genkern.static.hardware import BOARDS
from genkern.static.peer import per_tensor

INTRODUCTION = """\
# The static report

Made by `{command}`: **compiled** and, where bytes are counted, **executed** on a CPU; not
run on a GPU. Nothing here is a measurement of speed. {versions}.
"""

RESOURCES = """\
## Registers, spills, shared memory, occupancy

Each cell: registers of a thread; kilobytes of shared memory of a block, static and dynamic, as
the launcher asks for it; the share of a multiprocessor's warps that fit on it at once. **spills**
is said where the compiler spills, *stack* where a thread has an array in local memory. A dash
instead of the last two: no call of the list below launches the kernel, so its block is not known
here.
"""

LOOPS = """\
## Inner loops

Instructions of the inner loop, from the machine code: tensor-core / memory (global, shared,
local) / others. The inner loop is the one that holds the tensor-core instructions (without any:
multiply-adds; without these: accesses to global memory); of several the one with the most of
them, of equals the shortest. In parentheses: no such loop, so the whole kernel. Tensor-core
instructions of sm_90 (wgmma) and sm_100 (tcgen05) do many times the work of one of mma.sync, so
columns are not to be compared.
"""

CALLS = """\
## Launches a call, and lower bounds on time

Columns CUDA and Triton: how many kernels a call launches on each. The others: the time below which
no kernel can do it on the boards of the last table: the least bytes (every tensor that goes in or
comes out, once) over the memory's peak, or the least operations of the formula's products over the
peak of what computes them, whichever is more. **Lower bounds, not predictions, and nothing
measured.**
"""

BYTES = """\
## Bytes moved

Counted by the executor while it runs the kernels' PTX: what all threads together ask of global
memory, beside the least. No cache is considered, and a number that all threads of a warp load at
once, such as a table's, counts once for each of them.
"""

PEER = """\
## Beside FlexAttention

All instructions of attention's inner loops for each tensor-core instruction (`mma.sync` of the
same shape in all): causal, bf16, tiles without a mask. FlexAttention is the Triton kernels that the
installed torch's Inductor renders and configures by default, compiled ahead of time here; its
backward is one kernel with both sweeps, of as many products as ours.
"""

PEAKS = """\
## The boards behind the lower bounds

Public peaks: dense, teraoperations a second; tensor: bf16 and fp16 with fp32 sums (of the T4 fp16
alone).
"""


def render(facts):
    targets = facts["targets"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [INTRODUCTION.format(command=facts["command"], versions=versions)]
    kernels = [*facts.get("cuda", []), *facts.get("triton", [])]
    if kernels:
        parts += [
            _spills(kernels),
            _too_large(kernels),
            RESOURCES,
            _of_kernels(kernels, targets, _resources),
        ]
        parts += [LOOPS, _of_kernels(kernels, targets, _instructions)]
    if "ptx" in facts:
        sizes = ", ".join(f"{file} {size / 1e3:.0f} kB" for file, size in facts["ptx"].items())
        parts.append(f"PTX for compute_120, from which later GPUs would compile: {sizes}.\n")
    if launching := [call for call in facts.get("calls", []) if call["launches"]]:
        parts += [CALLS, _calls(launching, targets)]
    if "bytes" in facts:
        parts += [BYTES, _bytes(facts["bytes"])]
    if facts.get("peer"):
        parts += [PEER, _peer(facts["peer"])]
    parts += [PEAKS, _peaks(targets)]
    parts += [f"Not made: {name}: {why}\n" for name, why in facts["missing"].items()]
    return "\n".join(parts)


def table(header, rows, texts=1):
    """A Markdown table; the first `texts` columns to the left."""
    rule = ["---"] * texts + ["--:"] * (len(header) - texts)
    lines = [header, rule, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _spills(kernels):
    spilling = sorted({f"{k['kernel']} ({k['target']})" for k in kernels if k["spills"]})
    backends = " and ".join(sorted({kernel["backend"] for kernel in kernels}))
    if spilling:
        return f"Kernels that spill: {', '.join(spilling)}.\n"
    return f"No kernel spills: {len(kernels)} of {backends}, every kernel and target below.\n"


def _too_large(kernels):
    """Of the shared memory of a block that a target allows."""
    too_large = sorted(
        f"{kernel['kernel']} ({kernel['target']})"
        for kernel in kernels
        if "occupancy" in kernel and not kernel["occupancy"]["blocks"]
    )
    if too_large:
        return f"Kernels that need more than a target has, so cannot run: {', '.join(too_large)}.\n"
    return "Every one that a call below launches fits on its target.\n"


def _of_kernels(kernels, targets, cell):
    """A row for every kernel, a column for every target."""
    rows, order = {}, []
    for kernel in kernels:
        key = kernel["op"], kernel["backend"], kernel["kernel"]
        if key not in rows:
            order.append(key)
        rows.setdefault(key, {})[kernel["target"]] = cell(kernel)
    order.sort(key=lambda key: key[:2])
    header = ["op", "kernel", "backend", *targets]
    lines = [
        [op, f"`{name}`", backend, *(rows[op, backend, name].get(x, "") for x in targets)]
        for op, backend, name in order
    ]
    return table(header, lines, texts=3)


def _resources(kernel):
    parts = [f"{kernel['registers']}"]
    if "occupancy" in kernel:
        parts.append(f"{kernel['shared_bytes'] / 1024:.0f}")
        parts.append(f"{kernel['occupancy']['share']:.0%}")
    else:
        parts.append("–")
    if kernel["spills"]:
        parts.append(f"**spills {kernel['spills']}**")
    elif kernel.get("stack"):
        parts.append(f"*stack {kernel['stack']}*")
    return ", ".join(parts)


def _instructions(kernel):
    loop = kernel["loop"]
    tensor = loop.get("tensor", 0)
    text = f"{tensor} / {loop['memory']} / {loop['all'] - tensor - loop['memory']}"
    return text if loop["is_loop"] else f"({text})"


def _calls(calls, targets):
    boards = [target for target in targets if target in BOARDS]
    header = ["call", "CUDA", "Triton", "least MB", "GFLOP", *(BOARDS[x].name for x in boards)]
    rows = []
    for call in calls:
        rows.append(
            [
                call["call"],
                str(len(call["launches"])),
                str(call["triton_launches"]),
                f"{call['least_bytes'] / 1e6:.1f}",
                f"{call['operations'] / 1e9:.1f}" if call["operations"] else "–",
                *(_bound(*call["bounds"][target]) for target in boards),
            ]
        )
    return table(header, rows)


def _bound(seconds, by):
    return f"{seconds * 1e6:.1f} µs ({by})"


def _bytes(rows):
    lines = []
    for row in rows:
        moved = row["read"] + row["written"]
        cells = [f"{row[key] / 1e6:.2f}" for key in ("read", "written", "least")]
        lines.append([row["call"], *cells, f"{moved / row['least']:.2f}×"])
    return table(["call", "MB read", "MB written", "least MB", "moved / least"], lines)


def _peer(rows):
    header = ["target", "d", "sweep", "its tiles", "FlexAttention", "genkern CUDA"]
    lines = []
    for row in rows:
        tiles = "{rows}×{columns}, {num_warps} warps".format(**row["configuration"])
        loops = [row.get(name) for name in ("flex", "cuda", "triton")]
        cells = [f"{per_tensor(x):.2f}" if x else "–" for x in loops]
        sweep = row["sweep"].replace("_", ", ")
        lines.append([row["target"], str(row["features"]), sweep, tiles, *cells])
    return table([*header, "genkern Triton"], lines, texts=4) + "\n" + _verdict(rows)


def _verdict(rows):
    """Where ours need more, plainly."""
    sentences = []
    for backend, name in (("cuda", "CUDA"), ("triton", "Triton")):
        known = [row for row in rows if row.get(backend)]
        more = [row for row in known if per_tensor(row[backend]) > per_tensor(row["flex"])]
        where = {}
        for row in more:
            what = f"{row['sweep'].replace('_', ', ')}, d={row['features']}"
            where.setdefault(what, []).append(row["target"])
        if more:
            listed = "; ".join(f"{what}: {', '.join(on)}" for what, on in where.items())
            in_rows = "every row" if len(more) == len(known) else f"these rows: {listed}"
            sentences.append(f"genkern's {name} kernels need **more** than it in {in_rows}.\n")
        elif known:
            sentences.append(f"genkern's {name} kernels need no more than it in any row.\n")
    return "".join(sentences)


def _peaks(targets):
    rows = [
        [target, board.name, *(f"{x / 1e12:g}" for x in board[1:4]), f"{board.memory / 1e9:g}"]
        for target, board in BOARDS.items()
        if target in targets
    ]
    return table(["target", "board", "tensor", "fp32", "fp64", "memory, GB/s"], rows, texts=2)
