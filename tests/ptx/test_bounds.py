"""Accesses outside, misaligned, to what may only be read or is not written yet: all are caught."""

import numpy as np
import ptx_test_tensor_cores as tensor_cores
import pytest
from ptx_conformance import own, run
from ptx_test_mistakes import SCHEDULES, TILE, exchange

from genkern import ptx


def test_off_by_one_in_shared_memory():
    with pytest.raises(ptx.OutOfBounds, match="shared"):
        exchange(offset="+256", partner=0)
    with pytest.raises(ptx.OutOfBounds, match="shared"):
        exchange(offset="+4", partner=0)  # the last thread's
    with pytest.raises(ptx.OutOfBounds, match="shared"):
        exchange(offset="+-4", partner=0)


def test_off_by_one_between_two_shared_variables():
    shared = ".shared .align 4 .b32 first[4];\n.shared .align 4 .b32 second[4];"
    body = "mov.u32 %r3, {name};\nst.shared.b32 [%r3+{offset}], %r0;\nmov.u32 %r4, {other};\n"
    for name, other in (("first", "second"), ("second", "first")):
        run(body.format(name=name, other=other, offset=12), block=1, shared=shared)
        with pytest.raises(ptx.OutOfBounds):
            run(body.format(name=name, other=other, offset=16), block=1, shared=shared)


def test_dynamic_shared_memory_ends_where_the_launch_says():
    shared = ".extern .shared .align 16 .b8 dynamic[];"
    body = "mov.u32 %r3, dynamic;\nst.shared.b8 [%r3+99], %r0;\n"
    run(body, block=1, shared=shared, shared_bytes=100)
    with pytest.raises(ptx.OutOfBounds, match="99 of them dynamic"):
        run(body, block=1, shared=shared, shared_bytes=99)


@pytest.mark.parametrize("offset", [-1, 8])
@pytest.mark.parametrize("access", ["ld.global.b8 %r3, [%rd1+{}];", "st.global.b8 [%rd1+{}], %r3;"])
def test_off_by_one_byte_in_global_memory(access, offset):
    memory = np.zeros(24, np.uint8)
    run(access.format(0) + access.format(7), memory[8:16], block=1)
    with pytest.raises(ptx.OutOfBounds, match=f"byte {offset} of a buffer of 8 bytes"):
        run(access.format(offset), memory[8:16], block=1)


def test_an_access_that_ends_outside():
    with pytest.raises(ptx.OutOfBounds):
        run("ld.global.b64 %rd3, [%rd1];", np.zeros(7, np.uint8)[:7], block=1)


def test_strided_arrays_reach_from_their_first_to_their_last_element():
    memory = np.arange(32, dtype=np.uint32)
    body = "ld.global.b32 %r2, [%rd1+{}];"
    run(body.format(4 * 28), memory[0:32:4], block=1)
    with pytest.raises(ptx.OutOfBounds):
        run(body.format(4 * 29), memory[0:32:4], block=1)


def test_a_null_pointer():
    with pytest.raises(ptx.OutOfBounds, match="far from every buffer"):
        run("mov.u64 %rd2, 0;\nld.global.b32 %r2, [%rd2];", np.zeros(1), block=1)


def test_a_write_to_what_may_only_be_read():
    x = np.zeros(4, np.uint32)
    x.flags.writeable = False
    with pytest.raises(ptx.ReadOnly, match="may only be read"):
        run("st.global.b32 [%rd1], %r0;", x, block=1)
    with pytest.raises(ptx.ReadOnly):
        run("atom.global.add.u32 %r2, [%rd1], 1;", x, block=1)


@pytest.mark.parametrize(
    "access",
    ["ld.global.b32 %r2, [%rd1+2];", "st.global.v4.b32 [%rd1+8], {%r0, %r0, %r0, %r0};",
     "atom.global.add.u64 %rd2, [%rd1+4], %rd1;"],
)  # fmt: skip
def test_misaligned_accesses(access):
    with pytest.raises(ptx.Misaligned, match="no multiple of"):
        run(access, np.zeros(8, np.float64), block=1)


def test_reads_of_shared_memory_that_nobody_wrote():
    body = """
    mov.u32 %r3, tile;
    st.shared.b8 [%r3], %r0;
    st.shared.b8 [%r3+1], %r0;
    st.shared.b8 [%r3+{}], %r0;
    ld.shared.b32 %r4, [%r3];
    """
    with pytest.raises(ptx.Uninitialised, match="byte 2"):
        run(body.format(3), block=1, shared=TILE)
    body += "st.shared.b8 [%r3+2], %r0;\n"
    with pytest.raises(ptx.Uninitialised, match="byte 3"):
        run(body.format(2), block=1, shared=TILE)
    full = body.replace("ld.shared", "st.shared.b8 [%r3+3], %r0;\nld.shared")
    run(full.format(2), block=1, shared=TILE)


def test_shared_memory_of_the_block_before_is_gone():
    body = """
    mov.u32 %r3, tile;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 st.shared.b32 [%r3], 5;
    ld.shared.b32 %r4, [%r3];
    """
    with pytest.raises(ptx.Uninitialised) as error:
        run(body, grid=2, block=1, shared=TILE)
    assert error.value.block == (1, 0, 0)


# One product of tensor cores: a (16x16) and b (16x8) of halves through shared memory. Lane i gives
# ldmatrix the address of row i % 16 of a, in the left or the right half.
PRODUCT = f"""
mov.u32 %r2, a;
mov.u32 %r3, b;
shl.b32 %r4, %r0, 4;
{own("%rd1", 16)}
ld.global.v4.b32 {{{{%r20, %r21, %r22, %r23}}}}, [%rd10];
add.u32 %r5, %r2, %r4;
st.shared.v4.b32 [%r5], {{{{%r20, %r21, %r22, %r23}}}};
setp.lt.u32 %p1, %r0, 16;
{own("%rd2", 16)}
@%p1 ld.global.v4.b32 {{{{%r20, %r21, %r22, %r23}}}}, [%rd10];
add.u32 %r5, %r3, %r4;
@%p1 st.shared.v4.b32 [%r5], {{{{%r20, %r21, %r22, %r23}}}};
bar.sync 0;
and.b32 %r6, %r0, 15;
mov.u32 %r9, %r6;
{{row}}
shl.b32 %r7, %r6, 5;
shr.u32 %r8, %r0, 4;
shl.b32 %r8, %r8, 4;
add.u32 %r7, %r7, %r8;
add.u32 %r7, %r7, %r2;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{{%r24, %r25, %r26, %r27}}}}, [%r7];
shl.b32 %r9, %r9, 4;
add.u32 %r9, %r9, %r3;
ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{{{%r28, %r29}}}}, [%r9];
mov.f32 %f0, 0f00000000;
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{{%f1, %f2, %f3, %f4}}}},
 {{{{%r24, %r25, %r26, %r27}}}}, {{{{%r28, %r29}}}}, {{{{%f0, %f0, %f0, %f0}}}};
{own("%rd3", 16)}
st.global.v4.f32 [%rd10], {{{{%f1, %f2, %f3, %f4}}}};
"""


def product(row="", a_bytes=512, **options):
    """What the kernel makes of small integers, whose product is exact, and what it should make."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, s).astype(np.float16) for s in ((16, 16), (16, 8)))
    out = np.zeros((32, 4), np.float32)
    shared = f".shared .align 16 .b8 a[{a_bytes}];\n.shared .align 16 .b8 b[256];"
    run(PRODUCT.format(row=row), a, b, out, shared=shared, **options)
    found = tensor_cores.assembled(out.view("u4"), tensor_cores.C_F32, (16, 8), 1, np.float32)
    return found, a.astype(np.float64) @ b.astype(np.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_wrong_row_of_ldmatrix(schedule):
    found, wanted = product(schedule=schedule)
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ptx.OutOfBounds, match="between two variables"):
        product("add.u32 %r6, %r6, 1;", schedule=schedule)  # lane 15 reads behind the matrix
    with pytest.raises(ptx.Uninitialised, match="nothing has written"):
        product("add.u32 %r6, %r6, 1;", a_bytes=544, schedule=schedule)  # a row of padding
    # Within the matrix no check can see it, but the product does.
    found, wanted = product("add.u32 %r6, %r6, 1;\nand.b32 %r6, %r6, 15;", schedule=schedule)
    np.testing.assert_array_equal(found, np.roll(wanted, -1, axis=0))
    assert (found != wanted).any()
