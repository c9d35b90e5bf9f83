"""What orders two accesses of one byte: atomics, fences, and writing the same number."""

import numpy as np
import pytest
from ptx_conformance import own, run

from genkern import ptx

SCHEDULES = ("sequential", "reversed", 1, 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_missing_atomic(schedule):
    out = np.zeros(1, np.uint32)
    run("red.global.add.u32 [%rd1], 1;", out, grid=3, block=64, schedule=schedule)
    assert out[0] == 192
    plain = "ld.global.b32 %r2, [%rd1];\nadd.u32 %r2, %r2, 1;\nst.global.b32 [%rd1], %r2;"
    with pytest.raises(ptx.Race, match="global"):
        run(plain, out, block=64, schedule=schedule)
    with pytest.raises(ptx.Race, match="block"):
        run(plain, out, grid=2, block=1, schedule=schedule)


LAST_BLOCK = """
mul.wide.u32 %rd5, %r1, 4;
add.s64 %rd6, %rd1, %rd5;
st.global.b32 [%rd6], %r1;
{release}
atom.global.add.u32 %r2, [%rd2], 1;
{acquire}
setp.ne.u32 %p1, %r2, 2;
@%p1 bra DONE;
ld.global.v2.b32 {{%r3, %r4}}, [%rd1];
ld.global.b32 %r5, [%rd1+8];
add.u32 %r3, %r3, %r4;
add.u32 %r3, %r3, %r5;
st.global.b32 [%rd3], %r3;
DONE:
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_block_adds_up(schedule):
    def total(release, acquire):
        parts, count, out = np.zeros(4, "u4"), np.zeros(1, "u4"), np.zeros(1, "u4")
        body = LAST_BLOCK.format(release=release, acquire=acquire)
        run(body, parts, count, out, grid=3, block=1, schedule=schedule)
        return out[0]

    assert total("membar.gl;", "membar.gl;") == 3
    assert total("fence.acq_rel.gpu;", "fence.sc.sys;") == 3
    with pytest.raises(ptx.Race, match="no fence and atomic order the two blocks"):
        total("", "membar.gl;")
    with pytest.raises(ptx.Race, match="no fence follows that atomic"):
        total("membar.gl;", "")
    with pytest.raises(ptx.Race):
        total("membar.cta;", "membar.gl;")


# Every thread of a block writes; then thread 0 counts the block, and the last block adds up.
ALL_FENCE = f"""
mov.u32 %r2, %ntid.x;
mad.lo.u32 %r3, %r1, %r2, %r0;
mul.wide.u32 %rd5, %r3, 4;
add.s64 %rd6, %rd1, %rd5;
{{before}}
st.global.b32 [%rd6], %r3;
{{release}}
bar.sync 0;
setp.ne.u32 %p1, %r0, 0;
@%p1 bra COUNTED;
{{own_release}}
atom.global.add.u32 %r4, [%rd2], 1;
{{own_acquire}}
mov.u32 %r5, seen;
st.shared.b32 [%r5], %r4;
COUNTED:
bar.sync 0;
{{acquire}}
mov.u32 %r5, seen;
ld.shared.b32 %r4, [%r5];
setp.ne.u32 %p2, %r4, 2;
@%p2 bra DONE;
{own("%rd1", 4)}
ld.global.b32 %r6, [%rd10];
ld.global.b32 %r7, [%rd10+256];
ld.global.b32 %r8, [%rd10+512];
add.u32 %r6, %r6, %r7;
add.u32 %r6, %r6, %r8;
{own("%rd3", 4)}
st.global.b32 [%rd10], %r6;
DONE:
"""


def added_up(release="", own_release="", own_acquire="", acquire="", before="", **options):
    parts, count, out = np.zeros(192, "u4"), np.zeros(1, "u4"), np.zeros(64, "u4")
    body = ALL_FENCE.format(release=release, own_release=own_release, own_acquire=own_acquire,
                            acquire=acquire, before=before)  # fmt: skip
    run(body, parts, count, out, grid=3, block=64, shared=".shared .align 4 .b32 seen;", **options)
    np.testing.assert_array_equal(out, 3 * np.arange(64) + 192)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_thread_fences_for_its_block(schedule):
    added_up(own_release="membar.gl;", own_acquire="membar.gl;", schedule=schedule)
    added_up(own_release="fence.acq_rel.gpu;", own_acquire="fence.acq_rel.gpu;", schedule=schedule)
    with pytest.raises(ptx.Race, match="no fence and atomic"):
        added_up(own_acquire="membar.gl;", schedule=schedule)
    with pytest.raises(ptx.Race, match="no fence follows"):
        added_up(own_release="membar.gl;", schedule=schedule)


def test_every_thread_fences_and_one_counts(schedules=SCHEDULES):
    # What __threadfence(); __syncthreads(); if (!threadIdx.x) atomicAdd(...) becomes.
    for schedule in schedules:
        added_up("membar.gl;", own_acquire="membar.gl;", schedule=schedule)
        added_up("membar.gl;", acquire="membar.gl;", schedule=schedule)
        added_up("fence.sc.gpu;", acquire="fence.sc.gpu;", schedule=schedule)
        added_up(own_release="membar.gl;", acquire="membar.gl;", schedule=schedule)
        with pytest.raises(ptx.Race, match="no fence and atomic"):
            added_up(acquire="membar.gl;", schedule=schedule)
        with pytest.raises(ptx.Race, match="no fence follows"):
            added_up("membar.gl;", schedule=schedule)
        # Lighter fences pair only within the threads of the atomics.
        with pytest.raises(ptx.Race):
            added_up("fence.acq_rel.gpu;", own_acquire="membar.gl;", schedule=schedule)
        with pytest.raises(ptx.Race, match=r"not both sides made a fence\.sc"):
            added_up("membar.gl;", own_acquire="fence.acq_rel.gpu;", schedule=schedule)
        with pytest.raises(ptx.Race):
            added_up("membar.cta;", own_acquire="membar.gl;", schedule=schedule)


def test_some_threads_forget_the_fence():
    # Threads 32 to 63 skip it: what they wrote is not published.
    release = "setp.lt.u32 %p3, %r0, 32;\n@%p3 membar.gl;"
    for schedule in SCHEDULES:
        with pytest.raises(ptx.Race):
            added_up(release, own_acquire="membar.gl;", schedule=schedule)


def test_a_fence_orders_only_what_came_before_it():
    for schedule in SCHEDULES:
        with pytest.raises(ptx.Race):
            added_up(before="membar.gl;", own_acquire="membar.gl;", schedule=schedule)
        parts, count, out = np.zeros(4, "u4"), np.zeros(1, "u4"), np.zeros(1, "u4")
        body = LAST_BLOCK.format(release="", acquire="membar.gl;")
        body = body.replace("st.global.b32 [%rd6], %r1;", "membar.gl;\nst.global.b32 [%rd6], %r1;")
        with pytest.raises(ptx.Race):
            run(body, parts, count, out, grid=3, block=1, schedule=schedule)


def test_a_warp_barrier_hands_on_to_the_thread_that_fences():
    # One warp a block: all write, __syncwarp(), lane 0 fences and counts.
    body = f"""
    mad.lo.u32 %r3, %r1, 32, %r0;
    mul.wide.u32 %rd5, %r3, 4;
    add.s64 %rd6, %rd1, %rd5;
    st.global.b32 [%rd6], %r3;
    {{barrier}}
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra DONE;
    membar.gl;
    atom.global.add.u32 %r4, [%rd2], 1;
    membar.gl;
    setp.ne.u32 %p2, %r4, 1;
    @%p2 bra DONE;
    ld.global.b32 %r6, [%rd1+{4 * 31}];
    ld.global.b32 %r7, [%rd1+{4 * 63}];
    add.u32 %r6, %r6, %r7;
    st.global.b32 [%rd3], %r6;
    DONE:
    """
    for schedule in SCHEDULES:
        parts, count, out = np.zeros(64, "u4"), np.zeros(1, "u4"), np.zeros(1, "u4")
        run(body.format(barrier="bar.warp.sync -1;"), parts, count, out, grid=2, schedule=schedule)
        assert out[0] == 31 + 63
        with pytest.raises(ptx.Race):
            run(body.format(barrier=""), parts, count * 0, out, grid=2, schedule=schedule)


SPACES = {"global": "[%rd1]", "shared": "[tile]"}


def written(value, space="global", second="", **options):
    """Every thread writes `value` to one place, in one instruction."""
    body = f"{value}\nst.{space}.b32 {SPACES[space]}, %r3;\n{second}"
    run(body, np.zeros(1, np.uint32), block=64, shared=".shared .align 4 .b32 tile;", **options)


@pytest.mark.parametrize("space", SPACES)
def test_the_same_number_from_one_instruction(space):
    for schedule in SCHEDULES:
        written("mov.u32 %r3, 7;", space, schedule=schedule)
        # In different blocks, nobody has the last word either, but here it is refused.
    with pytest.raises(ptx.Race):
        written("mov.u32 %r3, 7;", grid=2)


@pytest.mark.parametrize("space", SPACES)
def test_different_numbers_from_one_instruction(space):
    for schedule in SCHEDULES:
        with pytest.raises(ptx.Race, match="writes a byte that thread"):
            written("mov.u32 %r3, %r0;", space, schedule=schedule)
        # One thread alone differs, in its highest byte.
        one = "setp.eq.u32 %p1, %r0, 40;\nselp.b32 %r3, 0x1000007, 7, %p1;"
        with pytest.raises(ptx.Race, match="writes a byte that thread"):
            written(one, space, schedule=schedule)


@pytest.mark.parametrize("space", SPACES)
def test_the_same_number_from_two_instructions(space):
    # Threads of the first half write by one instruction, the others the same number by another.
    body = f"""
    mov.u32 %r3, 7;
    setp.lt.u32 %p1, %r0, 32;
    @%p1 st.{space}.b32 {SPACES[space]}, %r3;
    @!%p1 st.{space}.b32 {SPACES[space]}, %r3;
    """
    for schedule in SCHEDULES:
        with pytest.raises(ptx.Race, match="writes a byte that thread"):
            run(body, np.zeros(1, "u4"), block=64, shared=".shared .align 4 .b32 tile;",
                schedule=schedule)  # fmt: skip


def test_a_read_between_two_equal_writes():
    # Equal numbers excuse the writers, not who reads without a barrier.
    with pytest.raises(ptx.Race):
        written("mov.u32 %r3, 7;", second="ld.global.b32 %r4, [%rd1];")
    written("mov.u32 %r3, 7;", second="bar.sync 0;\nld.global.b32 %r4, [%rd1];")
