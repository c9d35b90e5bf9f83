"""Loads, stores, moves, atomics, hints, and who sees what was written."""

import struct

import numpy as np
import pytest
from ptx_conformance import own, run

from genkern import ptx


def test_loads_widen_and_stores_narrow():
    memory = np.frombuffer(struct.pack("<bhiq", -5, -6, -7, -8) + bytes(9), np.uint8)
    source = np.zeros(6, np.uint64)
    source.view(np.uint8)[[0, 8, 9, 16, 17, 18, 19]] = memory[[0, 1, 2, 3, 4, 5, 6]]
    body = """
    ld.global.s8 %r2, [%rd1];
    st.global.b32 [%rd2], %r2;
    ld.global.u8 %r2, [%rd1];
    st.global.b32 [%rd2+4], %r2;
    ld.global.s16 %rd3, [%rd1+8];
    st.global.b64 [%rd2+8], %rd3;
    ld.global.b16 %r2, [%rd1+8];
    st.global.b32 [%rd2+16], %r2;
    ld.global.s32 %rd3, [%rd1+16];
    st.global.b64 [%rd2+24], %rd3;
    mov.b32 %r2, 0x12345678;
    st.global.b8 [%rd2+32], %r2;
    st.global.u16 [%rd2+34], %r2;
    """
    out = np.zeros(5, np.uint64)
    run(body, source, out, block=1)
    raw = out.tobytes()
    assert struct.unpack("<iIqI", raw[:20]) == (-5, 251, -6, 65530)
    assert struct.unpack("<q", raw[24:32]) == (-7,)
    assert raw[32:36] == bytes([0x78, 0, 0x78, 0x56])


def test_vectors_keep_their_order_and_may_name_their_own_address():
    x = np.arange(1, 9, dtype=np.uint64)
    body = """
    ld.global.v2.b64 {%rd1, %rd3}, [%rd1];
    st.global.v2.b64 [%rd2], {%rd3, %rd1};
    """
    out = np.zeros(8, np.uint64)
    for array in (x, out):
        assert array.ctypes.data % 16 == 0
    run(body, x, out, block=1)
    assert out[:2].tolist() == [2, 1]


def test_moves_pack_and_unpack():
    body = """
    mov.b64 %rd3, {%r2, %r3};
    mov.b32 %r2, 0x11223344;
    mov.b32 {%h1, %h2}, %r2;
    mov.b32 %r4, {%h2, %h1};
    mov.b32 {_, %h3}, %r2;
    cvt.u32.u16 %r5, %h3;
    mov.b64 %rd4, {%r4, %r5};
    st.global.b64 [%rd1], %rd4;
    """
    out = np.zeros(1, np.uint64)
    run(body, out, block=1)
    assert int(out[0]) == 0x1122_33441122


ATOMICS = {
    "add.u32": lambda old, x: old + x,
    "min.s32": lambda old, x: min(old - (old >> 31 << 32), x - (x >> 31 << 32)),
    "max.u32": max,
    "and.b32": lambda old, x: old & x,
    "or.b32": lambda old, x: old | x,
    "xor.b32": lambda old, x: old ^ x,
    "exch.b32": lambda old, x: x,
    "inc.u32": lambda old, x: 0 if old >= x else old + 1,
    "dec.u32": lambda old, x: x if old == 0 or old > x else old - 1,
}


# Where semantics, scope and space stand; Triton writes the space first.
SPELLINGS = (".global", ".relaxed.gpu.global", ".acq_rel.sys.global", ".global.gpu.acq_rel")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_atomics(spelling):
    operands = [(5, 3), (0xFFFFFFF0, 0x20), (7, 7), (0, 9)]
    body, wanted = "", []
    for i, (name, function) in enumerate(ATOMICS.items()):
        for j, (_, x) in enumerate(operands):
            at = 4 * (len(operands) * i + j)
            body += f"atom{spelling}.{name} %r2, [%rd1+{at}], {x};\n"
            body += f"st.global.b32 [%rd2+{at}], %r2;\n"
            # exch has no red.
            operation = "red" if "exch" not in name else "atom"
            target = "" if operation == "red" else "%r3, "
            body += f"{operation}{spelling}.{name} {target}[%rd3+{at}], {x};\n"
        wanted += [function(old, x) % 2**32 for old, x in operands]
    memory = np.array([old for _ in ATOMICS for old, _ in operands], np.uint32)
    before, reduced, old = memory.copy(), memory.copy(), np.zeros_like(memory)
    run(body, memory, old, reduced, block=1)
    np.testing.assert_array_equal(memory, wanted)
    np.testing.assert_array_equal(reduced, wanted)
    np.testing.assert_array_equal(old, before)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_compare_and_swap_and_atomics_of_floats(spelling):
    body = """
    atom.global.cas.b32 %r2, [%rd1], 5, 9;
    atom.global.cas.b32 %r2, [%rd1+4], 6, 9;
    atom.global.add.u64 %rd3, [%rd1+8], 4294967296;
    mov.f32 %f1, 0f3FC00000;
    atom.global.add.f32 %f2, [%rd1+16], %f1;
    red.global.add.f32 [%rd1+16], %f1;
    mov.b32 %r3, 0x3c004000;
    atom.global.add.noftz.f16x2 %r4, [%rd1+20], %r3;
    red.global.add.noftz.f16x2 [%rd1+20], %r3;
    """
    memory = np.zeros(3, np.uint64).view(np.uint32)
    memory[:2] = 5
    run(body.replace(".global", spelling), memory, block=1)
    assert memory[:4].tolist() == [9, 5, 0, 1]
    assert memory[4:5].view(np.float32)[0] == 3
    assert int(memory[5]) == 0x40004400


def test_atomics_on_shared_memory_count_every_thread():
    body = """
    mov.u32 %r3, counter;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 st.shared.b32 [%r3], 0;
    bar.sync 0;
    atom.shared.add.u32 %r4, [%r3], 2;
    bar.sync 0;
    ld.shared.b32 %r5, [%r3];
    @%p1 st.global.b32 [%rd1], %r5;
    """
    out = np.zeros(1, np.uint32)
    run(body, out, block=96, shared=".shared .align 4 .b32 counter;")
    assert out[0] == 192


def test_reductions_at_a_barrier():
    body = f"""
    setp.lt.u32 %p1, %r0, 5;
    bar.red.popc.u32 %r2, 0, %p1;
    barrier.cta.red.and.aligned.pred %p2, 0, %p1;
    bar.red.or.pred %p3, 0, !%p1;
    selp.b32 %r3, 100, 0, %p2;
    selp.b32 %r4, 1000, 0, %p3;
    add.u32 %r2, %r2, %r3;
    add.u32 %r2, %r2, %r4;
    {own("%rd1", 4)}
    st.global.b32 [%rd10], %r2;
    """
    out = np.zeros(64, np.uint32)
    run(body, out, block=64)
    assert set(out.tolist()) == {1005}


def test_generic_addresses_reach_every_space():
    body = """
    mov.u32 %r2, tile;
    cvt.u64.u32 %rd3, %r2;
    cvta.shared.u64 %rd4, %rd3;
    st.b32 [%rd4], 11;
    cvta.to.shared.u64 %rd5, %rd4;
    ld.shared.b32 %r3, [%rd5];
    mov.u64 %rd6, own;
    cvta.local.u64 %rd7, %rd6;
    st.b32 [%rd7+4], 22;
    ld.local.b32 %r4, [%rd6+4];
    cvta.to.global.u64 %rd8, %rd1;
    isspacep.shared %p1, %rd4;
    @%p1 isspacep.shared::cta %p1, %rd4;
    isspacep.local %p2, %rd7;
    isspacep.global %p3, %rd1;
    isspacep.global %p4, %rd4;
    selp.b32 %r5, 1, 0, %p1;
    selp.b32 %r6, 1, 0, %p2;
    selp.b32 %r7, 1, 0, %p3;
    selp.b32 %r8, 1, 0, %p4;
    st.v4.b32 [%rd1], {%r3, %r4, %r5, %r6};
    st.global.v2.b32 [%rd8+16], {%r7, %r8};
    """
    out = np.zeros(8, np.uint32)
    run(body, out, block=1, shared=".shared .align 4 .b32 tile;\n.local .align 8 .b8 own[8];")
    assert out[:6].tolist() == [11, 22, 1, 1, 1, 0]


def test_local_memory_has_an_end():
    local = ".local .align 4 .b8 own[8];"
    body = "mov.u64 %rd6, own;\nst.local.b32 [%rd6+{}], 1;\n"
    run(body.format(4), block=2, shared=local)
    with pytest.raises(ptx.OutOfBounds, match="local memory, which has 8 bytes"):
        run(body.format(8), block=2, shared=local)


def test_hints_change_nothing():
    body = """
    createpolicy.fractional.L2::evict_last.b64 %rd9, 1.0;
    prefetch.global.L2 [%rd1];
    prefetch.L1 [%rd1+1000000];
    prefetch.global.L2::evict_last [%rd1];
    prefetchu.L1 [%rd1];
    ldu.global.b32 %r2, [%rd1];
    ld.global.ca.L1::evict_first.L2::cache_hint.L2::128B.b32 %r3, [%rd1+4], %rd9;
    ld.global.nc.L1::no_allocate.b32 %r4, [%rd1+8];
    ld.weak.global.b32 %r5, [%rd1+12];
    fence.proxy.async;
    fence.proxy.async.shared::cta;
    fence.cta;
    membar.cta;
    nanosleep.u32 20;
    griddepcontrol.wait;
    griddepcontrol.launch_dependents;
    setmaxnreg.inc.sync.aligned.u32 64;
    st.weak.global.wt.L2::cache_hint.v4.b32 [%rd2], {%r2, %r3, %r4, %r5}, %rd9;
    """
    x, out = np.arange(1, 5, dtype=np.uint32), np.zeros(4, np.uint32)
    x.flags.writeable = False
    result = run(body, x, out, block=1)
    np.testing.assert_array_equal(out, x)
    assert (result.bytes_read, result.bytes_written) == (16, 16)


def test_a_flag_that_another_block_published():
    body = """
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra READER;
    st.global.b32 [%rd1], 42;
    st.{release}.global.b32 [%rd2], 1;
    bra DONE;
    READER:
    ld.{acquire}.global.b32 %r2, [%rd2];
    setp.eq.u32 %p2, %r2, 0;
    @%p2 bra DONE;
    ld.global.b32 %r3, [%rd1];
    st.global.b32 [%rd3], %r3;
    DONE:
    """

    def seen(release, acquire):
        data, flag, out = (np.zeros(1, np.uint32) for _ in range(3))
        run(body.format(release=release, acquire=acquire), data, flag, out, grid=2, block=1)
        return out[0]

    assert seen("release.gpu", "acquire.gpu") == 42
    with pytest.raises(ptx.Race):
        seen("relaxed.gpu", "acquire.gpu")
    with pytest.raises(ptx.Race):
        seen("release.gpu", "relaxed.gpu")


@pytest.mark.parametrize("schedule", ["sequential", "reversed", 0, 7])
def test_every_thread_of_every_block_runs_once(schedule):
    body = """
    mov.u32 %r2, %ctaid.y;
    mov.u32 %r3, %nctaid.x;
    mad.lo.u32 %r4, %r2, %r3, %r1;
    mov.u32 %r5, %ntid.x;
    mov.u32 %r6, %tid.y;
    mad.lo.u32 %r7, %r6, %r5, %r0;
    mad.lo.u32 %r8, %r4, 96, %r7;
    mul.wide.u32 %rd3, %r8, 4;
    add.s64 %rd3, %rd1, %rd3;
    ld.global.b32 %r9, [%rd3];
    add.u32 %r9, %r9, %r8;
    st.global.b32 [%rd3], %r9;
    """
    out = np.zeros(6 * 96, np.uint32)
    result = run(body, out, grid=(3, 2), block=(48, 2), schedule=schedule)
    np.testing.assert_array_equal(out, np.arange(6 * 96))
    assert result.bytes_read == result.bytes_written == out.nbytes
    assert result.instructions == 6 * 96 * (body.count(";") + 4)
