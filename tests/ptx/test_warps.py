"""Shuffles, votes, matches, reductions and elections, against what PTX says they do."""

import numpy as np
import pytest
from ptx_conformance import own, run

from genkern import ptx

LANES = np.arange(32)
LOAD = own("%rd1", 4) + "ld.global.b32 %r2, [%rd10];\n"
STORE = own("%rd2", 4) + "st.global.b32 [%rd10], %r3;\n"


def through(instructions, values, more=(), **options):
    """What the lanes hold in %r3 after instructions on %r2, which each loaded from `values`."""
    out = np.zeros(32, np.uint32)
    run(LOAD + instructions + STORE, np.asarray(values, np.uint32), out, *more, **options)
    return out


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle_moves_values_within_segments(mode):
    values = np.random.default_rng(0).integers(0, 2**32, 32, np.uint32)
    instructions = f"""
    ld.global.v2.b32 {{%r5, %r6}}, [%rd4];
    shfl.sync.{mode}.b32 %r3|%p1, %r2, %r5, %r6, -1;
    selp.b32 %r4, 1, 0, %p1;
    {own("%rd3", 4)} st.global.b32 [%rd10], %r4;
    """
    for width in (32, 16, 4, 1):
        for by in (0, 1, 5, 17, 31):
            clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
            found = np.zeros(32, np.uint32)
            out = through(instructions, values, [found, np.array([by, clamp], np.uint32)])
            start = LANES // width * width
            source = {
                "up": LANES - by,
                "down": LANES + by,
                "bfly": LANES ^ by,
                "idx": start + by % width,
            }[mode]
            inside = (source >= start) & (source < start + width)
            # bfly may reach down into a segment before its own.
            np.testing.assert_array_equal(
                found, inside if mode != "bfly" else source < start + width, f"{width} {by}"
            )
            np.testing.assert_array_equal(out, values[np.where(found, source, LANES)])


def test_halves_of_a_warp_shuffle_apart():
    body = """
    setp.lt.u32 %p1, %r0, 16;
    @%p1 bra LOW;
    shfl.sync.bfly.b32 %r3, %r2, 1, 31, 0xffff0000;
    bra DONE;
    LOW:
    shfl.sync.bfly.b32 %r3, %r2, 2, 31, 0xffff;
    DONE:
    """
    for schedule in ("sequential", "reversed", 1, 2, 3):
        out = through(body, LANES, schedule=schedule)
        np.testing.assert_array_equal(out, np.where(LANES < 16, LANES ^ 2, LANES ^ 1))


@pytest.mark.parametrize("values", [LANES % 3 == 0, LANES >= 0, LANES < 0])
def test_votes(values):
    body = "setp.ne.b32 %p1, %r2, 0;\n"
    expected = {
        "ballot": sum(int(v) << i for i, v in enumerate(values)),
        "all": int(values.all()),
        "any": int(values.any()),
        "uni": int(values.all() or not values.any()),
    }
    for mode, wanted in expected.items():
        if mode == "ballot":
            vote = "vote.sync.ballot.b32 %r3, %p1, -1;\n"
        else:
            vote = f"vote.sync.{mode}.pred %p2, %p1, -1;\nselp.b32 %r3, 1, 0, %p2;\n"
        assert set(through(body + vote, values).tolist()) == {wanted}, mode


def test_votes_of_some_lanes_and_of_a_negated_predicate():
    body = """
    setp.ne.b32 %p1, %r2, 0;
    setp.lt.u32 %p2, %r0, 5;
    @%p2 vote.sync.ballot.b32 %r3, !%p1, 0x1f;
    @!%p2 mov.b32 %r3, 7;
    """
    out = through(body, LANES % 2)
    np.testing.assert_array_equal(out, np.where(LANES < 5, 0b10101, 7))


def test_match():
    values = LANES % 5
    same = [sum(1 << j for j in LANES if values[j] == values[i]) for i in LANES]
    np.testing.assert_array_equal(through("match.any.sync.b32 %r3, %r2, -1;\n", values), same)
    wide = "cvt.u64.u32 %rd4, %r2;\nshl.b64 %rd4, %rd4, 32;\nmatch.any.sync.b64 %r3, %rd4, -1;\n"
    np.testing.assert_array_equal(through(wide, values), same)
    both = "match.all.sync.b32 %r3|%p1, %r2, -1;\n@!%p1 mov.b32 %r3, 9;\n"
    assert set(through(both, values).tolist()) == {9}
    assert set(through(both, LANES * 0 + 4).tolist()) == {0xFFFFFFFF}


@pytest.mark.parametrize("values", ["random", "small"])
def test_integer_reductions(values):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2**32, 32, np.uint32) if values == "random" else LANES.astype(np.uint32)
    signed = x.astype(np.int32)
    expected = {
        "add.u32": int(x.sum(dtype=np.uint64)) % 2**32,
        "add.s32": int(x.sum(dtype=np.uint64)) % 2**32,
        "min.u32": int(x.min()),
        "max.u32": int(x.max()),
        "min.s32": int(signed.min()) % 2**32,
        "max.s32": int(signed.max()) % 2**32,
        "and.b32": int(np.bitwise_and.reduce(x)),
        "or.b32": int(np.bitwise_or.reduce(x)),
        "xor.b32": int(np.bitwise_xor.reduce(x)),
    }
    body, out = "", np.zeros((len(expected), 32), np.uint32)
    for i, operation in enumerate(expected):
        body += f"redux.sync.{operation} %r3, %r2, -1;\n{own('%rd2', 4)}"
        body += f"st.global.b32 [%rd10+{128 * i}], %r3;\n"
    run(LOAD + body, x, out)
    np.testing.assert_array_equal(out, np.array(list(expected.values()))[:, None].repeat(32, 1))


def test_float_reductions():
    x = np.random.default_rng(2).standard_normal(32).astype(np.float32)
    x[3] = np.nan

    def reduced(operation):
        (bits,) = set(through(f"redux.sync.{operation}.f32 %r3, %r2, -1;\n", x.view("u4")).tolist())
        return np.uint32(bits).view(np.float32)

    assert reduced("max") == np.nanmax(x)
    assert reduced("min") == np.nanmin(x)
    assert reduced("max.abs") == np.nanmax(abs(x))
    assert reduced("min.abs") == np.nanmin(abs(x))
    assert np.isnan(reduced("max.NaN"))


def test_special_registers():
    names = {
        "laneid": LANES,
        "lanemask_eq": 1 << LANES,
        "lanemask_lt": (1 << LANES) - 1,
        "lanemask_le": (2 << LANES) - 1,
        "lanemask_ge": 2**32 - (1 << LANES),
        "lanemask_gt": 2**32 - (2 << LANES),
        "warpid": LANES * 0,
        "ntid.x": LANES * 0 + 32,
        "nctaid.y": LANES * 0 + 1,
    }
    body, out = "", np.zeros((len(names), 32), np.uint32)
    for i, name in enumerate(names):
        body += f"mov.u32 %r3, %{name};\n{own('%rd1', 4)}st.global.b32 [%rd10+{128 * i}], %r3;\n"
    run(body, out)
    np.testing.assert_array_equal(out, np.array(list(names.values())))


def test_one_lane_is_elected():
    body = "elect.sync %r4|%p1, -1;\nselp.b32 %r3, 1, 0, %p1;\n"
    assert through(body, LANES).sum() == 1


def test_a_lane_counts_only_itself_as_active():
    np.testing.assert_array_equal(through("activemask.b32 %r3;\n", LANES), 1 << LANES)


@pytest.mark.parametrize(
    ("instructions", "words"),
    [
        ("setp.lt.u32 %p1, %r0, 16;\n@%p1 shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;\n", "lane 16"),
        ("shfl.sync.bfly.b32 %r3, %r2, 1, 31, 0xff;\n", "does not name lane"),
        ("shfl.sync.idx.b32 %r3, %r2, 9, 31, %r4;\n", "does not name"),
        ("vote.sync.ballot.b32 %r3, %p1, 0x7fffffff;\n", "lane 31"),
    ],
)
def test_an_absent_lane_is_an_error(instructions, words):
    mask = "shl.b32 %r4, 1, %r0;\n"  # each lane alone
    with pytest.raises(ptx.AbsentLane, match=words) as error:
        through(mask + instructions, LANES)
    assert error.value.kernel == "k" and error.value.line > 0


def test_lanes_at_different_instructions_do_not_meet():
    body = """
    setp.lt.u32 %p1, %r0, 16;
    @%p1 bra LOW;
    vote.sync.ballot.b32 %r3, %p1, -1;
    bra DONE;
    LOW:
    shfl.sync.bfly.b32 %r3, %r2, 2, 31, -1;
    DONE:
    """
    with pytest.raises(ptx.AbsentLane, match="another instruction"):
        through(body, LANES)


def test_a_block_without_whole_warps_has_no_full_mask():
    out = np.zeros(40, np.uint32)
    with pytest.raises(ptx.AbsentLane, match="does not have"):
        run(LOAD + "shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;\n" + STORE, out, out, block=40)
