"""Modules: parameters, variables, functions, tables of labels, and what is refused."""

import struct

import numpy as np
import pytest
from ptx_conformance import MODULE_OPTIONS, kernel_text, own, run

from genkern import ptx

MODULE = """
.version 8.0
.target sm_80
.address_size 64
.const .align 4 .b32 table[4] = {10, 20, 0x1e, 40};
.global .align 8 .f64 half = 0d3FE0000000000000;
.global .align 4 .u32 calls;
.func (.param .b32 result) scaled(.param .b32 x, .param .align 4 .b8 pair[8])
{
  .local .align 4 .b8 depot[8];
  .reg .b32 %r<8>;
  .reg .b64 %rd<4>;
  ld.param.b32 %r1, [x];
  ld.param.v2.b32 {%r2, %r3}, [pair];
  mov.u64 %rd1, depot;
  st.local.b32 [%rd1+4], %r3;
  ld.local.b32 %r4, [%rd1+4];
  mad.lo.s32 %r5, %r1, %r2, %r4;
  st.param.b32 [result+0], %r5;
  ret;
}
.visible .entry k(.param .align 8 .b8 problem[24], .param .u64 out, .param .f32 scale)
{
  .reg .b32 %r<16>;
  .reg .b64 %rd<8>;
  .reg .f32 %f<4>;
  .reg .f64 %fd<4>;
  .reg .pred %p<4>;
  ld.param.u64 %rd1, [out];
  ld.param.u32 %r1, [problem+4];
  ld.param.f64 %fd1, [problem+16];
  ld.param.f32 %f1, [scale];
  ld.const.b32 %r2, [table+8];
  mov.u64 %rd2, table;
  cvta.const.u64 %rd2, %rd2;
  ld.b32 %r3, [%rd2+12];
  ld.global.f64 %fd2, [half];
  mul.f64 %fd1, %fd1, %fd2;
  cvt.rn.f32.f64 %f2, %fd1;
  mul.f32 %f2, %f2, %f1;
  {
    .param .b32 argument;
    .param .align 4 .b8 both[8];
    .param .b32 answer;
    st.param.b32 [argument+0], %r2;
    st.param.v2.b32 [both+0], {%r1, %r3};
    call.uni (answer), scaled, (argument, both);
    ld.param.b32 %r4, [answer+0];
  }
  mov.u64 %rd3, calls;
  red.global.add.u32 [%rd3], 1;
  st.global.b32 [%rd1], %r4;
  st.global.f32 [%rd1+4], %f2;
  exit;
}
"""


def test_structs_variables_and_calls():
    module = ptx.Module(MODULE, **MODULE_OPTIONS)
    kernel = module.kernels["k"]
    assert [(p.name, p.size, p.offset) for p in kernel.parameters] == [
        ("problem", 24, 0), ("out", 8, 24), ("scale", 4, 32)
    ]  # fmt: skip
    out = np.zeros(2, np.uint32)
    problem = struct.pack("<iiqd", 0, 3, 0, 7.0)
    for _ in range(2):
        module.launch("k", 1, 1, [problem, out, 4.0])
    assert out[0] == 30 * 3 + 40
    assert out[1:].view(np.float32)[0] == 14
    assert module.variable("calls").view(np.uint32)[0] == 2


def test_parameters_read_through_their_address_are_no_global_memory():
    text = """
    .version 8.0
    .target sm_80
    .address_size 64
    .visible .entry k(.param .align 8 .b8 problem[24], .param .u64 out)
    {
      .reg .b32 %r<8>;
      .reg .b64 %rd<8>;
      mov.b64 %rd1, problem;
      ld.param.b32 %r1, [%rd1+4];
      cvta.param.u64 %rd2, %rd1;
      ld.b32 %r2, [%rd2+8];
      ld.param.v2.b32 {%r3, %r4}, [%rd1+LAST];
      ld.param.u64 %rd3, [out];
      st.global.v4.b32 [%rd3], {%r1, %r2, %r3, %r4};
      ret;
    }
    """
    problem, out = struct.pack("<6i", *range(6)), np.zeros(4, np.uint32)

    def launch(last, first="%rd1"):
        spoilt = text.replace("[%rd1+LAST]", f"[{first}+{last}]")
        return ptx.Module(spoilt, **MODULE_OPTIONS).launch("k", 1, 1, [problem, out])

    result = launch(16)
    assert out.tolist() == [1, 2, 4, 5]
    assert (result.bytes_read, result.bytes_written) == (0, 16)
    with pytest.raises(ptx.OutOfBounds, match="byte 32 of the parameters, which have 32 bytes"):
        launch(32)
    with pytest.raises(ptx.OutOfBounds, match="of the parameters"):
        launch(-8)
    with pytest.raises(ptx.Misaligned):
        launch(12)
    # Global memory is no parameter: by now %rd3 holds the address of out.
    text = text.replace("ld.param.v2", "ld.param.u64 %rd3, [out];\nld.param.v2")
    with pytest.raises(ptx.OutOfBounds, match="of the parameters"):
        launch(0, "%rd3")


def test_arguments_must_fit():
    module = ptx.Module(MODULE, **MODULE_OPTIONS)
    out = np.zeros(2, np.uint32)
    for arguments, words in (
        ([bytes(24), out], "3 parameters, 2 came"),
        ([bytes(23), out, 1.0], "24 bytes, 23 came"),
        ([bytes(24), 1.5j, 1.0], "complex came"),
    ):
        with pytest.raises(TypeError, match=words):
            module.launch("k", 1, 1, arguments)
    with pytest.raises(KeyError, match="no kernel"):
        module.launch("other", 1, 1, [])
    with pytest.raises(ValueError, match="at most 1024"):
        module.launch("k", 1, 1025, [bytes(24), out, 1.0])
    with pytest.raises(ValueError, match="schedule"):
        module.launch("k", 1, 1, [bytes(24), out, 1.0], schedule="random")


def test_a_jump_through_a_table():
    body = f"""
    TABLE: .branchtargets ZERO, ONE, TWO;
    rem.u32 %r2, %r0, 3;
    brx.idx %r2, TABLE;
    ZERO: mov.u32 %r3, 5; bra.uni DONE;
    ONE: mov.u32 %r3, 6; bra.uni DONE;
    TWO: mov.u32 %r3, 7;
    DONE:
    {own("%rd1", 4)}
    st.global.b32 [%rd10], %r3;
    """
    out = np.zeros(32, np.uint32)
    run(body, out)
    np.testing.assert_array_equal(out, 5 + np.arange(32) % 3)
    with pytest.raises(ptx.Trap, match="outside the table"):
        run(body.replace("rem.u32 %r2, %r0, 3;", "add.u32 %r2, %r0, 0;"), out)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("add.u33 %r2, %r2, %r2;", "no rule for add.u33"),
        ("max.f32 %f1, %f1, %f1, %f1, %f1;", "with 5 operands"),
        ("add.sat.u32 %r2, %r2, %r2;", "no rule for add.sat.u32"),
        ("ld.global.frob.b32 %r2, [%rd1];", "no rule"),
        ("ld.global.v2.b32 {%r2, %r3, %r4}, [%rd1];", "2 elements expected"),
        ("wgmma.fence.sync.aligned;", "no rule"),
        ("add.s32 %rd2, %rd2, 1;", "register of type b64"),
        ("add.s32 %r2, %r2, %p1;", "register of type pred"),
        ("add.s32 %r2, %unknown, 1;", "unknown operand"),
        ("mov.u32 %r2, 0x1ffffffff;", "does not fit"),
        ("bra NOWHERE;", "label"),
        ("call.uni (%r2), %rd1, (%r2);", "only direct calls"),
        ("bar.sync 0, 33;", "multiple of 32"),
        ("cp.async.cg.shared.global [%r2], [%rd1], 8;", "cannot copy 8"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 %r2, %r2, %r2, %r2;", "no rule"),
        ("vote.ballot.b32 %r2, %p1;", "no rule"),
        ("ld.param.b32 %r2, [p1+8];", "outside the parameter"),
        (".frob 3;", "unknown declaration"),
    ],
)
def test_what_is_not_known_is_refused_with_its_line(text, words):
    with pytest.raises(ptx.UnsupportedPTX, match=words) as error:
        ptx.Module(kernel_text(text, 1), **MODULE_OPTIONS).kernels["k"].translation  # noqa: B018
    lines = kernel_text(text, 1).split("\n")
    assert lines[error.value.line - 1].strip() == text
