"""The report: which calls it speaks of, their least work, and how its facts are shown."""

import json

import pytest
import torch

from genkern import cli
from genkern.backend import has_cuda
from genkern.ops import _triton
from genkern.static import calls, cubins, gather, peer, render, rooflines
from genkern.static.hardware import BOARDS, LIMITS


def loop(tensor, memory, rest, is_loop=True):
    return {
        "all": tensor + memory + rest,
        "memory": memory,
        "tensor": tensor,
        "is_loop": is_loop,
    }


def row(kernel, target, backend="cuda", op="attention", **more):
    found = {"op": op, "kernel": kernel, "backend": backend, "target": target}
    found |= {"registers": 128, "spills": 0, "loop": loop(64, 20, 300)}
    return {**found, **more}


SHARE = {"blocks": 1, "warps": 4, "share": 0.25, "limited_by": "registers"}
KNOWN = {"shared_bytes": 48 * 1024, "threads": 128, "occupancy": SHARE}


def facts(**more):
    known = {"command": "genkern static", "versions": {"nvcc": "13.0"}}
    return {**known, "targets": ["sm_80", "sm_90"], "missing": {}, **more}


# ---- Calls --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [calls.all_calls, calls.small_calls])
def test_names_are_unique(which):
    names = [call.name for call in which()]
    assert len(set(names)) == len(names)


def test_least_work_of_attention():
    call = calls.attention("forward", torch.bfloat16, 1, 2, 64, 32, M=128, dv=16)
    assert call.operations == 2 * 2 * 64 * 128 * (32 + 16)
    assert call.unit == "tensor" and call.name == "attention forward 1×2×64×32 M=128 dv=16 bf16"
    step, inputs = call.prepare()
    q, k, v, out = 2 * 64 * 32, 2 * 128 * 32, 2 * 128 * 16, 2 * 64 * 16
    assert calls.least_bytes(inputs, step()) == 2 * (q + k + v + out)


@pytest.mark.parametrize("call", calls.small_calls(), ids=lambda call: call.name)
def test_every_step_runs_and_gives_what_goes_out(call):
    """On the CPU's kernels, so that inputs and results are real."""
    step, inputs = call.prepare()
    results = list(step())
    assert inputs and results and all(isinstance(x, torch.Tensor) for x in [*inputs, *results])
    assert calls.least_bytes(inputs, results) > 0


@pytest.mark.parametrize("what", calls._PRODUCTS)
def test_passes_of_attention_are_those_of_their_name(what):
    """Read from the launches of Triton's kernels."""
    if _triton.problem():
        pytest.skip(_triton.problem())
    names = {
        "forward": ["attention_forward"],
        "backward": ["attention_backward_rows", "attention_backward_columns"],
        "second order": [f"attention_second_{x}" for x in ("stats", "rows", "columns")],
        "jvp": ["attention_forward", "attention_jvp"],
    }
    call = calls.attention(what, torch.float32, 1, 1, 64, 32)
    launches, _, _ = calls.step_under("triton", call, lambda: _triton.recording("sm_80"))
    assert [launch.kernel.__name__ for launch in launches] == names[what]


# ---- Lower bounds -------------------------------------------------------------------------------


def test_bounds():
    call = calls.attention("forward", torch.bfloat16, 1, 1, 4096, 64)
    a100 = BOARDS["sm_80"]
    assert rooflines.bounds(call, 1000)["sm_80"] == (call.operations / a100.tensor, "tensor")
    assert rooflines.bounds(call, 10**12)["sm_80"] == (10**12 / a100.memory, "memory")
    single = calls.attention("forward", torch.float32, 1, 1, 4096, 64)
    assert rooflines.bounds(single, 1000)["sm_80"] == (single.operations / a100.fp32, "fp32")


# ---- Markdown -----------------------------------------------------------------------------------


def test_tables():
    text = render.render(
        facts(
            cuda=[
                row("forward<bf16, 64, 64>", "sm_80", **KNOWN),
                row("forward<bf16, 64, 64>", "sm_90", stack=16),
            ],
            triton=[row("attention_forward bf16 d=64", "sm_80", "triton", **KNOWN)],
        )
    )
    assert "No kernel spills: 3 of cuda and triton" in text
    assert (
        "| attention | `forward<bf16, 64, 64>` | cuda | 128, 48, 25% | 128, –, *stack 16* |" in text
    )
    assert "| attention | `attention_forward bf16 d=64` | triton | 128, 48, 25% |  |" in text
    assert "| attention | `forward<bf16, 64, 64>` | cuda | 64 / 20 / 300 | 64 / 20 / 300 |" in text


def test_spills_are_said_first_and_in_their_cells():
    text = render.render(facts(cuda=[row("heavy", "sm_90", spills=24, **KNOWN)]))
    assert "Kernels that spill: heavy (sm_90)." in text and "**spills 24**" in text


def test_what_does_not_fit_is_said_first():
    none = {"blocks": 0, "warps": 0, "share": 0.0, "limited_by": "shared memory"}
    text = render.render(facts(cuda=[row("large", "sm_80", **{**KNOWN, "occupancy": none})]))
    assert "Kernels that need more than a target has, so cannot run: large (sm_80)." in text
    assert "fits on its target" in render.render(facts(cuda=[row("small", "sm_80", **KNOWN)]))


def test_a_kernel_without_a_loop_stands_in_parentheses():
    text = render.render(facts(cuda=[row("flat", "sm_80", loop=loop(0, 4, 60, False))]))
    assert "(0 / 4 / 60)" in text


def test_calls_and_bytes():
    bounds = {"sm_80": [2e-6, "memory"], "sm_90": [1e-6, "tensor"]}
    call = {"call": "a call", "operations": 0, "least_bytes": 4_000_000, "bounds": bounds}
    call |= {"triton_launches": 3, "launches": [{}, {}]}
    moved = {"call": "a call", "launches": 1, "read": 3e6, "written": 1e6, "least": 2e6}
    text = render.render(facts(calls=[call], bytes=[moved]))
    assert "| a call | 2 | 3 | 4.0 | – | 2.0 µs (memory) | 1.0 µs (tensor) |" in text
    assert "| a call | 3.00 | 1.00 | 2.00 | 2.00× |" in text
    assert "Lower bounds, not predictions" in " ".join(text.split())


def test_what_could_not_be_made_is_said():
    text = render.render(facts() | {"missing": {"cuda": "no nvcc"}})
    assert text.endswith("Not made: cuda: no nvcc\n")


def test_unknown_names_are_errors(capsys):
    assert cli.main(["static", "--targets", "sm_70"]) == 1
    assert "--targets must be among sm_75, sm_80" in capsys.readouterr().err
    assert cli.main(["static", "nothing"]) == 1
    assert "no op's name begins with 'nothing'" in capsys.readouterr().err


# ---- Facts --------------------------------------------------------------------------------------


def test_cuda_rows_know_their_blocks(monkeypatch):
    kernel = cubins.Kernel("losses/x.cu", "_Zx", "x", "sm_80", 32, 0, 0, 1024, gather_loop())
    monkeypatch.setattr(cubins, "sources", lambda folder: [cubins.Path("csrc/losses/x.cu")])
    monkeypatch.setattr(cubins, "kernels", lambda files, targets, say: [kernel])
    launch = {"symbol": "_Zx", "threads": 256, "dynamic_bytes": 2048}
    (found,) = gather._cuda("losses", ["sm_80"], None, [{"launches": [launch]}])
    assert found["shared_bytes"] == 3072 and found["occupancy"]["warps"] == 64
    (found,) = gather._cuda("losses", ["sm_80"], None, [])
    assert "occupancy" not in found and found["static_bytes"] == 1024


def gather_loop():
    from collections import Counter

    from genkern.static.sass import Loop

    return Loop(Counter({"global": 2, "multiply-add": 3}))


@pytest.mark.skipif(not has_cuda(), reason="the CUDA half was not built: `genkern info` says why")
def test_launches_of_a_call_on_cuda():
    (row,) = gather._calls([calls.hinge("both passes", 5, 64)])
    assert any("backward" in launch["kernel"] for launch in row["launches"])
    assert all(launch["threads"] >= 32 for launch in row["launches"])
    assert row["least_bytes"] == 2 * 10 * 64 * 4 + 4


@pytest.mark.skipif(not has_cuda(), reason="the CUDA half was not built: `genkern info` says why")
def test_every_launch_fits_on_every_target():
    """Dynamic shared memory alone: what is static, only the compiler knows."""
    least = min(limits.shared_of_block for name, limits in LIMITS.items() if name != "sm_75")
    for of_call in gather._calls(calls.all_calls()):
        for launch in of_call["launches"]:
            most = (
                least
                if of_call["call"].startswith("attention")
                else LIMITS["sm_75"].shared_of_block
            )
            assert launch["dynamic_bytes"] <= most, (of_call["call"], launch)
            assert launch["threads"] <= 1024


# ---- The peer -----------------------------------------------------------------------------------


def of_peer(sweep="forward", **more):
    found = {"target": "sm_80", "features": 64, "sweep": sweep, "flex": loop(128, 50, 600)}
    found["configuration"] = {"rows": 128, "columns": 64, "num_warps": 4, "num_stages": 3}
    return found | more


def test_ours_beside_the_peer():
    ours = [row("forward<bf16, 64, 64>", "sm_80"), row("forward<bf16, 128, 128>", "sm_80")]
    theirs = [row("attention_forward bf16 d=64", "sm_80", "triton", loop=loop(64, 10, 10))]
    forward, rows = of_peer(), of_peer("backward_rows")
    assert [peer._is_its_like(x, forward) for x in [*ours, *theirs]] == [True, False, True]
    assert not peer._is_its_like(row("forward<fp16, 64, 64>", "sm_80"), forward)
    backward = row("backward_rows<bf16, 64, 64>", "sm_80")
    assert not peer._is_its_like(backward, forward) and peer._is_its_like(backward, rows)
    text = render._peer([forward | {"cuda": ours[0]["loop"], "triton": theirs[0]["loop"]}])
    assert "| sm_80 | 64 | forward | 128×64, 4 warps | 6.08 | 6.00 | 1.31 |" in text
    assert "CUDA kernels need no more" in text and "Triton kernels need no more" in text


def test_where_ours_need_more_is_said():
    slow, fast = loop(64, 20, 400), loop(64, 20, 100)
    rows = [of_peer("backward_rows", cuda=slow), of_peer(cuda=fast), of_peer()]
    text = render._peer([*rows, of_peer("backward_rows", cuda=slow, target="sm_86")])
    said = "CUDA kernels need **more** than it in these rows: backward, rows, d=64: sm_80, sm_86."
    assert said in text and "Triton kernels" not in text
    assert "need **more** than it in every row." in render._peer([rows[0]])


def test_flex_attention_is_rendered_by_torch_itself(monkeypatch, tmp_path):
    """On a stand-in of a GPU: its inner loops have tensor cores, and their kernels need no GPU."""
    if _triton.problem():
        pytest.skip(_triton.problem())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        found = peer.compared(["sm_80"])
    except OSError as error:
        pytest.skip(str(error)) if "cuobjdump is neither" in str(error) else pytest.fail(str(error))
    rows = [(x["target"], x["features"], x["sweep"]) for x in found]
    assert rows == [("sm_80", d, sweep) for d in peer.FEATURES for sweep in peer.SWEEPS]
    for x in found:
        assert x["flex"]["is_loop"] and x["flex"]["tensor"] >= 64
        assert 3 < peer.per_tensor(x["flex"]) < 12
    said = []
    assert peer.compared(["sm_80"], say=said.append) == found and not said, "it is kept"


def test_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gather, "gather", lambda *args, **options: facts())
    file = tmp_path / "facts.json"
    assert cli.main(["static", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["versions"] == {"nvcc": "13.0"}
    assert capsys.readouterr().out.startswith("# The static report")
