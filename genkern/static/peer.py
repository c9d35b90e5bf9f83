"""A peer for attention's inner loops: FlexAttention's Triton kernels as torch itself makes them.

Inductor itself renders its templates, with its own default configuration for each kind of GPU; only
the GPU is a stand-in (`python -m genkern.static.peer sm_80 …`, in a process of its own, because the
stand-in stays). The kernels are then compiled ahead of time, as Triton's kernels of ours are, and
their inner loops found by the same rule. Causal attention in bf16, no score_mod: of its loops those
over whole blocks count, without any mask. FlexAttention's backward is one kernel with a sweep along
rows (dq: three products) and one along columns (dk, dv: four), as ours are two kernels.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from genkern.ops import _triton
from genkern.static import kept, sass, tools, triton_kernels

TARGETS = ("sm_80", "sm_86", "sm_89")  # where all of attention's kernels use mma.sync
FEATURES = (64, 128)
# A sweep, by our kernel's name: the products of its inner loop; the sizes of its tiles in
# FlexAttention's configuration.
SWEEPS = {
    "forward": (2, "BLOCK_M", "BLOCK_N"),
    "backward_rows": (3, "BLOCK_M2", "BLOCK_N2"),
    "backward_columns": (4, "BLOCK_M1", "BLOCK_N1"),
}
_LENGTH = 4096
_BLOCK = 128
_OF_MMA = 16 * 8 * 16  # multiply-adds of an mma.sync of bf16


def compared(targets, *ours, say=lambda text: None):
    """A row for every target, head dimension and sweep of attention: the instructions of the inner
    loops, FlexAttention's and, of `ours` (rows of the report), each backend's."""
    rows = [row for target in TARGETS if target in targets for row in _theirs(target, say)]
    for row in rows:
        for kernel in (kernel for kernels in ours for kernel in kernels):
            if kernel["target"] == row["target"] and _is_its_like(kernel, row):
                row[kernel["backend"]] = kernel["loop"]
    return rows


def _theirs(target, say):
    """FlexAttention's rows for a target, from the cache or made now in another process."""

    def make():
        say(target)
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-W", "ignore", "-m", "genkern.static.peer", target]
        said = tools.output(command, env=environment)
        return [json.loads(line) for line in said.splitlines() if line.startswith('{"target"')]

    made_by = torch.__version__, _triton.version(), Path(__file__).read_bytes(), kept.reader()
    return kept.kept(f"peer-{target}-{kept.digest(*made_by)}", make)


def per_tensor(loop):
    """All instructions of an inner loop for each tensor-core instruction in it."""
    return loop["all"] / loop["tensor"] if loop.get("tensor") else float("inf")


def _is_its_like(kernel, row):
    """Whether a row of the report is of the same sweep in bf16 for heads of as many features."""
    sweep, features = row["sweep"], row["features"]
    return kernel["op"] == "attention" and kernel["kernel"] in (
        f"attention_{sweep} bf16 d={features}",
        f"{sweep}<bf16, {features}, {features}>",
    )


# ---- In a process of its own --------------------------------------------------------------------


def main(targets):
    graphs = [(x, _traced(x, backward)) for x in FEATURES for backward in (False, True)]
    for target in targets:  # from here on there is a GPU
        _pretend(int(target.removeprefix("sm_")))
        for features, (graph, inputs) in graphs:
            for row in _compiled(target, features, _rendered(graph, inputs)):
                print(json.dumps(row), flush=True)


def _traced(features, backward):
    """FlexAttention's graph of one pass as Inductor receives it, and its inputs, as if on a GPU."""
    from torch._dynamo.backends.common import aot_autograd
    from torch.nn.attention import flex_attention as module

    module._validate_device = lambda *args: None  # on the CPU it refuses gradients
    received = []

    def receive(graph, inputs):
        received.append((graph, inputs))
        return graph.forward

    blocks = _LENGTH // _BLOCK
    counts = [torch.zeros(1, 1, blocks, dtype=torch.int32) for _ in range(4)]
    indices = [torch.zeros(1, 1, blocks, blocks, dtype=torch.int32) for _ in range(4)]
    pairs = [x for pair in zip(counts, indices, strict=True) for x in pair]
    mask = module.BlockMask(
        (_LENGTH, _LENGTH), *pairs, BLOCK_SIZE=(_BLOCK, _BLOCK), mask_mod=_is_not_later
    )
    size = 1, 8, _LENGTH, features
    inputs = (torch.zeros(size, dtype=torch.bfloat16, requires_grad=backward) for _ in range(3))
    function = torch.compile(module.flex_attention, backend=aot_autograd(fw_compiler=receive))
    now = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    with now, torch._inductor.config.patch(fallback_random=True):
        try:
            function(*inputs, block_mask=mask, kernel_options={"BACKEND": "TRITON"})
        except Exception:  # to run it on the CPU is not what this is about
            if not received:
                raise
    graph, inputs = received[backward]
    for part in graph.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            if "val" in node.meta:
                node.meta["val"] = torch.utils._pytree.tree_map(_moved, node.meta["val"])
    return graph, [_moved(x) for x in inputs]


def _is_not_later(b, h, q, k):
    return q >= k


def _moved(x):
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(x, FakeTensor):
        return x
    empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return FakeTensor(x.fake_mode, empty, torch.device("cuda:0"))


def _pretend(capability):
    """Gives Inductor and Triton a GPU to compile for. Its sizes matter to nothing but autotuning,
    which a single configuration needs not."""
    from torch._dynamo.device_interface import DeviceInterface, register_interface_for_device
    from triton.runtime import driver

    from genkern.assembly import _Driver

    pair = divmod(capability, 10)
    properties = SimpleNamespace(
        name=f"sm_{capability}",
        major=pair[0],
        minor=pair[1],
        multi_processor_count=108,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=1536,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        shared_memory_per_block_optin=99 << 10,
        L2_cache_size=40 << 20,
    )

    class StandIn(DeviceInterface):
        class Worker:
            get_device_properties = staticmethod(lambda device=None: properties)
            current_device = staticmethod(lambda: 0)

        get_device_properties = Worker.get_device_properties
        current_device = Worker.current_device
        is_available = staticmethod(lambda: True)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)
        is_bf16_supported = staticmethod(lambda *args: True)
        get_compute_capability = staticmethod(lambda device=None: capability)
        device_count = staticmethod(lambda: 1)
        synchronize = staticmethod(lambda *args: None)

    register_interface_for_device("cuda", StandIn)
    register_interface_for_device("cuda:0", StandIn)
    torch.cuda.get_device_capability = lambda *args: pair
    torch.cuda.get_device_properties = lambda *args: properties
    torch.version.cuda = torch.version.cuda or "13.0"
    driver.set_active(_Driver(f"sm_{capability}"))


def _rendered(graph, inputs):
    """Inductor's choice: the kernel with its options."""
    from torch._inductor.graph import GraphLowering
    from torch._inductor.select_algorithm import TritonTemplate
    from torch._inductor.virtualized import V

    made, generate = [], TritonTemplate.generate

    def watched(template, *args, **options):
        made.append(generate(template, *args, **options))
        return made[-1]

    TritonTemplate.generate = watched
    mode = inputs[0].fake_mode
    try:
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env)
        with V.set_graph_handler(lowering), V.set_fake_mode(mode), torch.no_grad():
            lowering.run(*inputs)
    finally:
        TritonTemplate.generate = generate
    (choice,) = made
    return choice.bmreq


def _compiled(target, features, request):
    """A row for each sweep of a kernel."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = PyCodeCache.load_by_key_path(request.module_cache_key, request.module_path)
    tuner = getattr(module, request.kernel_name)
    (meta,) = tuner.triton_meta["configs"]
    source = ASTSource(tuner.fn, tuner.triton_meta["signature"], {}, dict(meta))
    options = {"num_warps": request.num_warps, "num_stages": request.num_stages}
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    made = triton.compile(source, target=gpu, options=options)
    (code,) = triton_kernels.code_of(made.asm["cubin"]).values()
    sizes = tuner.inductor_meta["config_args"]
    for sweep, (products, rows, columns) in SWEEPS.items():
        if rows not in sizes:
            continue
        tile = {"rows": sizes[rows], "columns": sizes[columns], **options}
        whole = products * features * sizes[rows] * sizes[columns]
        loop = _sweep(code, whole // (_OF_MMA * options["num_warps"]))
        yield {
            "target": target,
            "features": features,
            "sweep": sweep,
            "configuration": {**tile, "shared_bytes": made.metadata.shared},
            "flex": {"all": loop.all, "memory": loop.memory, "is_loop": True, **loop.count},
        }


def _sweep(code, tensor):
    """The shortest inner loop with so many tensor-core instructions: that without a mask."""
    found = sass.inner_loops(code, "tensor")
    if not (alike := [loop for loop in found if loop.tensor == tensor]):
        raise RuntimeError(
            f"FlexAttention's kernel has no loop of {tensor} tensor-core instructions, but of "
            f"{', '.join(str(loop.tensor) for loop in found)}"
        )
    return min(alike, key=lambda loop: loop.all)


if __name__ == "__main__":
    main(sys.argv[1:])
