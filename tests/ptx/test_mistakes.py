"""Kernels with one mistake each in the order of their threads, which must be caught, beside the
right ones, which must pass."""

import numpy as np
import pytest
from ptx_conformance import own, run

from genkern import ptx

SCHEDULES = ("sequential", "reversed", 1, 2)


# Threads hand their values on through shared memory: out[i] = x[n - 1 - i].
EXCHANGE = f"""
{own("%rd1", 4)}
ld.global.b32 %r2, [%rd10];
mov.u32 %r3, tile;
shl.b32 %r4, %r0, 2;
add.u32 %r5, %r3, %r4;
st.shared.b32 [%r5], %r2;
{{barrier}}
xor.b32 %r6, %r4, {{partner}};
add.u32 %r7, %r3, %r6;
ld.shared.b32 %r8, [%r7{{offset}}];
{own("%rd2", 4)}
st.global.b32 [%rd10], %r8;
"""
TILE = ".shared .align 4 .b32 tile[64];"


def exchange(barrier="bar.sync 0;", partner=252, offset="", block=64, more="", **options):
    x = np.arange(block, dtype=np.uint32) + 1
    x.flags.writeable = False
    out = np.zeros(block, np.uint32)
    body = EXCHANGE.format(barrier=barrier, partner=partner, offset=offset) + more
    run(body, x, out, block=block, shared=TILE, **options)
    return x, out


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_values_handed_on_through_shared_memory(schedule):
    x, out = exchange(schedule=schedule)
    np.testing.assert_array_equal(out, x[::-1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_missing_barrier(schedule):
    # Which of the two is seen first depends on who runs first; both name the mistake.
    with pytest.raises((ptx.Race, ptx.Uninitialised)):
        exchange("", schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_missing_barrier_where_the_memory_is_initialised(schedule):
    zeros = "add.u32 %r9, %r3, %r4;\nst.shared.b32 [%r9], 0;\nbar.sync 0;\n"
    body = EXCHANGE.format(barrier="", partner=252, offset="")
    body = body.replace("st.shared.b32 [%r5], %r2;", zeros + "st.shared.b32 [%r5], %r2;")
    with pytest.raises(ptx.Race, match="thread") as error:
        run(body, np.arange(64, dtype="u4"), np.zeros(64, "u4"), block=64, shared=TILE,
            schedule=schedule)  # fmt: skip
    assert error.value.line and error.value.thread and "in PTX line" in str(error.value)


def test_a_barrier_of_a_warp_orders_that_warp_alone():
    x, out = exchange("bar.warp.sync -1;", partner=124)  # i ^ 31
    np.testing.assert_array_equal(out.reshape(2, 32), x.reshape(2, 32)[:, ::-1])
    with pytest.raises((ptx.Race, ptx.Uninitialised)):
        exchange("bar.warp.sync -1;", partner=252)


def test_a_shuffle_orders_nothing_in_memory():
    with pytest.raises((ptx.Race, ptx.Uninitialised)):
        exchange("shfl.sync.idx.b32 %r9, %r2, 0, 31, -1;", partner=124)


def test_a_barrier_with_a_count_orders_those_who_came():
    # Each warp has a barrier of its own: enough within the warp, not across.
    barrier = "shr.u32 %r9, %r0, 5;\nadd.u32 %r9, %r9, 1;\nbarrier.sync %r9, 32;"
    exchange(barrier, partner=124)
    with pytest.raises((ptx.Race, ptx.Uninitialised)):
        exchange(barrier, partner=252)
    exchange("bar.sync 3, 64;")


PRODUCER = f"""
mov.u32 %r3, tile;
and.b32 %r4, %r0, 31;
shl.b32 %r4, %r4, 2;
add.u32 %r5, %r3, %r4;
setp.ge.u32 %p1, %r0, 32;
@%p1 bra CONSUMER;
st.shared.b32 [%r5], %r0;
{{arrive}}
bra DONE;
CONSUMER:
{{wait}}
ld.shared.b32 %r8, [%r5];
{own("%rd1", 4)}
st.global.b32 [%rd10+-128], %r8;
DONE:
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_producer_that_only_arrives(schedule):
    out = np.zeros(32, np.uint32)
    body = PRODUCER.format(arrive="bar.arrive 1, 64;", wait="bar.sync 1, 64;")
    run(body, out, block=64, shared=TILE, schedule=schedule)
    np.testing.assert_array_equal(out, np.arange(32))
    with pytest.raises((ptx.Race, ptx.Uninitialised)):
        run(PRODUCER.format(arrive="", wait=""), out, block=64, shared=TILE, schedule=schedule)


def test_a_consumer_whose_producer_never_comes():
    with pytest.raises(ptx.Divergence, match="barrier 1 for 64 threads"):
        body = PRODUCER.format(arrive="", wait="bar.sync 1, 64;")
        run(body, np.zeros(32, "u4"), block=64, shared=TILE)


def test_a_write_too_early_after_a_read():
    # The barrier after the loop's reads is missing: the next round overwrites what others read.
    body = f"""
    mov.u32 %r3, tile;
    shl.b32 %r4, %r0, 2;
    add.u32 %r5, %r3, %r4;
    mov.u32 %r9, 0;
    mov.u32 %r8, 0;
    LOOP:
    st.shared.b32 [%r5], %r9;
    bar.sync 0;
    ld.shared.b32 %r6, [%r3+{{place}}];
    add.u32 %r8, %r8, %r6;
    {{second}}
    add.u32 %r9, %r9, 1;
    setp.lt.u32 %p1, %r9, 3;
    @%p1 bra LOOP;
    {own("%rd1", 4)}
    st.global.b32 [%rd10], %r8;
    """
    out = np.zeros(64, np.uint32)
    run(body.format(second="bar.sync 0;", place=8), out, block=64, shared=TILE)
    assert set(out.tolist()) == {3}
    for schedule in SCHEDULES:
        with pytest.raises(ptx.Race, match=r"writes a byte that thread .* read"):
            run(body.format(second="", place=8), out, block=64, shared=TILE, schedule=schedule)


def test_reads_of_many_threads_are_all_remembered():
    # Warps 0 and 1 read; warp 1 then meets warp 2, which writes: warp 0's read is not ordered.
    body = """
    mov.u32 %r3, tile;
    setp.eq.u32 %p1, %r0, 64;
    @%p1 st.shared.b32 [%r3], 5;
    bar.sync 0;
    shr.u32 %r4, %r0, 5;
    setp.{who}.u32 %p2, %r4, 1;
    @%p2 ld.shared.b32 %r5, [%r3];
    setp.eq.u32 %p3, %r4, 0;
    @!%p3 bar.sync 1, 64;
    @%p1 st.shared.b32 [%r3], 6;
    """
    run(body.format(who="eq"), block=96, shared=TILE)
    for schedule in SCHEDULES:
        with pytest.raises(ptx.Race):
            run(body.format(who="le"), block=96, shared=TILE, schedule=schedule)


COPY = f"""
mov.u32 %r3, tile;
shl.b32 %r4, %r0, 2;
add.u32 %r5, %r3, %r4;
{own("%rd1", 4)}
cp.async.ca.shared.global [%r5], [%rd10], 4;
cp.async.commit_group;
{{wait}}
{{barrier}}
xor.b32 %r6, %r4, {{partner}};
add.u32 %r7, %r3, %r6;
ld.shared.b32 %r8, [%r7];
{own("%rd2", 4)}
st.global.b32 [%rd10], %r8;
"""


def copied(wait="cp.async.wait_group 0;", barrier="bar.sync 0;", partner=252, **options):
    x, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    body = COPY.format(wait=wait, barrier=barrier, partner=partner)
    run(body, x, out, block=64, shared=TILE, **options)
    return x, out


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_asynchronous_copies(schedule):
    x, out = copied(schedule=schedule)
    np.testing.assert_array_equal(out, x[::-1])
    x, out = copied("cp.async.wait_all;", "", partner=0, schedule=schedule)
    np.testing.assert_array_equal(out, x)
    with pytest.raises(ptx.Uninitialised, match="has not been waited for"):
        copied("", schedule=schedule)  # the wait is missing
    with pytest.raises(ptx.Uninitialised, match="has not been waited for"):
        copied("cp.async.wait_group 1;", schedule=schedule)  # one group too few
    with pytest.raises((ptx.Race, ptx.Uninitialised)):
        copied(barrier="", schedule=schedule)  # the pipeline's barrier is missing


def test_a_copy_over_what_others_still_read():
    # A pipeline of one stage whose second barrier is missing.
    body = f"""
    mov.u32 %r3, tile;
    shl.b32 %r4, %r0, 2;
    add.u32 %r5, %r3, %r4;
    xor.b32 %r6, %r4, 252;
    add.u32 %r7, %r3, %r6;
    {own("%rd1", 4)}
    mov.u32 %r9, 0;
    LOOP:
    cp.async.ca.shared.global [%r5], [%rd10], 4;
    cp.async.wait_all;
    bar.sync 0;
    ld.shared.b32 %r8, [%r7];
    {{second}}
    add.u32 %r9, %r9, 1;
    setp.lt.u32 %p1, %r9, 3;
    @%p1 bra LOOP;
    """
    x = np.arange(64, dtype=np.uint32)
    run(body.format(second="bar.sync 0;"), x, block=64, shared=TILE)
    for schedule in SCHEDULES:
        with pytest.raises(ptx.Race):
            run(body.format(second=""), x, block=64, shared=TILE, schedule=schedule)


def test_copies_fill_with_zeros_and_read_no_further_than_they_say():
    body = """
    mov.u32 %r3, tile;
    st.shared.b32 [%r3], 1;
    sub.u32 %r4, 12, 0;
    cp.async.cg.shared.global [%r3], [%rd1], 16, {source};
    cp.async.wait_all;
    ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
    st.global.v4.b32 [%rd2], {{%r4, %r5, %r6, %r7}};
    """
    tile = ".shared .align 16 .b8 tile[16];"
    x = np.zeros(8, np.uint64).view(np.uint32)[:5]
    x = x[-x.ctypes.data % 16 // 4 :][:3]
    x[:] = [7, 8, 9]
    out = np.full(6, 5, np.uint64).view(np.uint32)
    out = out[-out.ctypes.data % 16 // 4 :][:4]
    run(body.format(source=12), x, out, block=1, shared=tile)
    np.testing.assert_array_equal(out, [7, 8, 9, 0])
    with pytest.raises(ptx.OutOfBounds):
        run(body.format(source=13), x, out, block=1, shared=tile)


def test_a_barrier_that_one_thread_skips():
    body = "setp.eq.u32 %p1, %r0, 3;\n@%p1 bra OUT;\nbar.sync 0;\nOUT:\n"
    with pytest.raises(ptx.Divergence, match=r"64 threads and 63 came: thread \(3, 0, 0\)"):
        run(body, block=64)


def test_lanes_of_a_warp_at_two_barriers():
    body = "setp.lt.u32 %p1, %r0, 7;\n@%p1 bra A;\nbar.sync 0;\nbra B;\nA:\nbar.sync 0;\nB:\n"
    with pytest.raises(ptx.Divergence, match="different places"):
        run(body, block=64)
    run(body.replace("bar.sync", "barrier.sync"), block=64)
    run(body.replace(", 7;", ", 32;"), block=64)  # whole warps may


def test_two_barriers_that_wait_for_each_other():
    body = "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra A;\nbar.sync 1;\nbra B;\nA:\nbar.sync 2;\nB:\n"
    with pytest.raises(ptx.Divergence, match="another barrier"):
        run(body, block=64)


def test_a_loop_without_end():
    with pytest.raises(ptx.Deadlock, match="in circles"):
        run("LOOP:\nbra LOOP;", block=1)


def test_a_thread_that_spins_until_another_comes():
    body = """
    mov.u32 %r3, tile;
    setp.eq.u32 %p1, %r0, 40;
    setp.eq.u32 %p3, %r0, 0;
    @%p3 st.shared.b32 [%r3], 0;
    bar.sync 0;
    @%p1 atom.shared.exch.b32 %r4, [%r3], 1;
    LOOP:
    ld.volatile.shared.b32 %r5, [%r3];
    setp.eq.u32 %p2, %r5, 0;
    @%p2 bra LOOP;
    """
    plain = body.replace("ld.volatile", "ld").replace("@%p1 atom", "@%p4 atom")
    plain = plain.replace("bra LOOP", "bra OUT") + "OUT:\n"
    for schedule in SCHEDULES:
        # What many threads read plainly in a launch before is nothing to this one.
        run(plain, block=64, shared=TILE, schedule=schedule)
        run(body, block=64, shared=TILE, schedule=schedule)


def test_trap():
    with pytest.raises(ptx.Trap):
        run("trap;", block=1)


def test_the_error_says_where():
    with pytest.raises(ptx.OutOfBounds) as error:
        run("setp.eq.u32 %p1, %r0, 5;\n@%p1 ld.global.b32 %r2, [%rd1+400];", np.zeros(1), grid=2)
    assert error.value.kernel == "k"
    assert (error.value.block, error.value.thread) == ((0, 0, 0), (5, 0, 0))
    assert "ld.global.b32 %r2" in str(error.value)
