"""A peer for attention's inner loops: FlexAttention's Triton kernel as torch itself makes it.

Inductor itself renders its template, with its own default configuration for each kind of GPU; only
the GPU is a stand-in (`python -m genkern.static.peer sm_80 …`, in a process of its own, because the
stand-in stays). The kernel is then compiled ahead of time, as Triton's kernels of ours are, and its
inner loop found by the same rule. Causal attention in bf16, no score_mod: of its two loops the one
over whole blocks counts, without any mask.
"""

import json
import os
import sys
import tempfile
from types import SimpleNamespace

import torch

from genkern.static import sass, tools

TARGETS = ("sm_80", "sm_86", "sm_89")  # where all of attention's kernels use mma.sync
FEATURES = (64, 128)
_LENGTH = 4096
_BLOCK = 128


def compared(targets, *ours):
    """A row for every target and head dimension: the instructions of the inner loops of
    attention's forward, FlexAttention's and, of `ours` (rows of the report), each backend's."""
    chosen = [target for target in TARGETS if target in targets]
    if not chosen:
        return []
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "genkern.static.peer", *chosen]
    said = tools.output(command, env=environment)
    rows = [json.loads(line) for line in said.splitlines() if line.startswith('{"target"')]
    for row in rows:
        for kernel in (kernel for kernels in ours for kernel in kernels):
            if kernel["target"] == row["target"] and _is_its_like(kernel, row["features"]):
                row[kernel["backend"]] = kernel["loop"]
    return rows


def per_tensor(loop):
    """All instructions of an inner loop for each tensor-core instruction in it."""
    return loop["all"] / loop["tensor"] if loop.get("tensor") else float("inf")


def _is_its_like(kernel, features):
    """Whether a row is of attention's forward in bf16 for heads of so many features."""
    numbers = [
        int(x) for x in kernel["kernel"].replace(",", " ").replace(">", " ").split() if x.isdigit()
    ]
    of_triton = kernel["kernel"] == f"attention_forward bf16 d={features}"
    of_cuda = kernel["kernel"].startswith("forward") and numbers[:2] == [features, features]
    return of_triton or (kernel["op"] == "attention" and "bf16" in kernel["kernel"] and of_cuda)


# ---- In a process of its own --------------------------------------------------------------------


def main(targets):
    graphs = {features: _traced(features) for features in FEATURES}  # before the GPU is one
    for target in targets:
        _pretend(int(target.removeprefix("sm_")))
        for features, (graph, inputs) in graphs.items():
            print(json.dumps(_compiled(target, features, _rendered(graph, inputs))), flush=True)


def _traced(features):
    """FlexAttention's graph as Inductor receives it, and its inputs, as if on a GPU."""
    from torch._dynamo.backends.common import aot_autograd
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    received = []

    def receive(graph, inputs):
        received.append((graph, inputs))
        return graph.forward

    blocks = _LENGTH // _BLOCK
    counts = [torch.zeros(1, 1, blocks, dtype=torch.int32) for _ in range(4)]
    indices = [torch.zeros(1, 1, blocks, blocks, dtype=torch.int32) for _ in range(4)]
    pairs = [x for pair in zip(counts, indices, strict=True) for x in pair]
    mask = BlockMask(
        (_LENGTH, _LENGTH), *pairs, BLOCK_SIZE=(_BLOCK, _BLOCK), mask_mod=_is_not_later
    )
    q, k, v = (torch.zeros(1, 8, _LENGTH, features, dtype=torch.bfloat16) for _ in range(3))
    function = torch.compile(flex_attention, backend=aot_autograd(fw_compiler=receive))
    with torch.no_grad(), torch._inductor.config.patch(fallback_random=True):
        try:
            function(q, k, v, block_mask=mask, kernel_options={"BACKEND": "TRITON"})
        except Exception:  # to run it on the CPU is not what this is about
            if not received:
                raise
    graph, inputs = received[0]
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        (code,) = sass.functions(tools.output([tools.cuobjdump(), "-sass", file.name])).values()
    loop = sass.inner_loop(code)
    sizes = {x: tuner.inductor_meta["config_args"][x] for x in ("BLOCK_M", "BLOCK_N")}
    return {
        "target": target,
        "features": features,
        "configuration": {**sizes, **options, "shared_bytes": made.metadata.shared},
        "flex": {"all": loop.all, "memory": loop.memory, "is_loop": loop.is_loop, **loop.count},
    }


if __name__ == "__main__":
    main(sys.argv[1:])
