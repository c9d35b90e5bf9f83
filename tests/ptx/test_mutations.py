"""The tests of the executor are put to the test: a rule or a line of the runtime is spoilt, and a
test must notice."""

import re
import shutil

import ptx_conformance as conformance
import ptx_conversion_cases as conversions
import ptx_float_cases as floats
import ptx_half_cases as halves
import ptx_integer_cases as integers
import ptx_test_bounds as bounds
import ptx_test_mistakes as mistakes
import ptx_test_order as order
import ptx_test_tensor_cores as tensor_cores
import ptx_test_warps as warps
import pytest

from genkern.ptx import ExecutionError, build
from genkern.ptx.rules import TABLE

exhaustive = pytest.mark.exhaustive


@pytest.fixture(autouse=True)
def cache_of_its_own(monkeypatch, tmp_path):
    """What is spoilt must not fill the user's cache."""
    monkeypatch.setenv("GENKERN_CACHE", str(tmp_path))


def noticed(cases, opcode):
    """Whether the cases of an opcode find a mismatch."""
    of_opcode = [c for c in cases.CASES if c.text.split(" ")[0] == opcode]
    assert of_opcode, f"no case tests {opcode}"
    return conformance.mismatches(of_opcode) != []


# Opcode, and what of its C++ is replaced by what.
RULES = [
    (integers, "sub.u32", "a - b", "b - a"),
    (integers, "mad.wide.s32", "s64(a)", "u64(u32(a))"),
    (integers, "lop3.b32", "a, b, c", "c, b, a"),
    (integers, "bfi.b32", "a, b, c, e", "a, b, e, c"),
    (integers, "selp.b32", "a : b", "b : a"),
    (integers, "shf.r.wrap.b32", "& 31", "& 63"),
    (integers, "min.relu.s32", ", 0)", ", 1)"),
    (floats, "sub.rz.ftz.f32", "negated(b)", "b"),
    (floats, "fma.rn.f32", "__builtin_fmaf(a, b, c)", "a * b + c"),
    (floats, "max.f32", "maximum<{ftz}, {nan}, none>(a, b)", None),
    (floats, "copysign.f32", "a, b", "b, a"),
    (floats, "rcp.rp.f32", "{round}", "rn"),
    (floats, "ex2.approx.ftz.f32", "{ftz}", "none"),
    (halves, "fma.rn.bf16", "half_fma<{ftz}, {sat}, none>(a, b, c)",
     "half_add<none, none>(half_mul<none, none>(a, b), c)"),
    (halves, "min.NaN.f16", "{nan}", "none"),
    (conversions, "cvt.rzi.s32.f32", "{round}", "rni"),
    (conversions, "cvt.sat.u8.s32", "{sat}", "none"),
    (conversions, "cvt.rn.bf16x2.f32", "(b)", "(a)"),
    (conversions, "cvt.rna.tf32.f32", "{round}", "rz"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("cases", "opcode", "old", "new"),
    [
        pytest.param(*r, id=r[1], marks=[] if i % 7 == 0 else exhaustive)
        for i, r in enumerate(RULES)
    ],
)
def test_a_spoilt_rule_is_noticed(monkeypatch, cases, opcode, old, new):
    text = next(c for c in cases.CASES if c.text.split(" ")[0] == opcode).text
    rule, _ = TABLE.find(opcode, text.count(",") + 1)
    if new is None:  # a third operand is forgotten
        rule, _ = TABLE.find(opcode, 4)
        spoilt = rule._replace(cpp="maximum<{ftz}, {nan}, none>(a, b)")
    else:
        assert old in rule.cpp
        spoilt = rule._replace(cpp=rule.cpp.replace(old, new, 1))
    monkeypatch.setitem(conformance.MODULE_OPTIONS, "table", TABLE.with_rule(rule, spoilt))
    assert noticed(cases, opcode)


def cases(module, opcode):
    def check():
        assert not noticed(module, opcode)

    return check


def mistake(name, *arguments, module=mistakes):
    return lambda: getattr(module, name)(*arguments)


def bound(name):
    return mistake(name, module=bounds)


def ordering(name, *arguments):
    return mistake(name, *arguments, module=order)


# A file of the runtime, the old text and the new, and a test that must fail.
RUNTIME = [
    ("floats.cpp", "FE_DOWNWARD", "FE_UPWARD", cases(floats, "add.rm.f32")),
    ("floats.h", "return flip ? negated(result) : result;", "return result;",
     cases(floats, "min.xorsign.abs.f32")),
    ("floats.h", "sign_of(a) ? a : b;", "a;", cases(floats, "min.f32")),
    ("halves.h", "if (bits & 1) return sum;", "return sum;", cases(halves, "fma.rn.bf16")),
    ("conversions.h", "(bits >> 16 & 1)) >> 16", "1) >> 16", cases(conversions, "cvt.rn.bf16.f32")),
    ("conversions.h", "return is_signed ? To((u64(1) << (bits - 1)) - 1) : To(~u64(0));",
     "return 0;",
     cases(conversions, "cvt.rzi.s32.f32")),
    ("integers.h", "0x08) result |= ~a & b & c", "0x08) result |= a & b & c",
     cases(integers, "lop3.b32")),
    ("integers.h", "if (selector & 8)", "if (false)", cases(integers, "prmt.b32")),
    ("warps.cpp", "source = s32(lane + b)", "source = s32(lane + b / 2)",
     lambda: warps.test_shuffle_moves_values_within_segments("down")),
    ("warps.cpp", "<< lane; });", "; });",
     warps.test_votes_of_some_lanes_and_of_a_negated_predicate),
    ("warps.cpp", "if (mine.mask & ~lanes_of(t))", "if (false)",
     warps.test_a_block_without_whole_warps_has_no_full_mask),
    ("warps.cpp", "other->kind != mine.kind", "false",
     warps.test_lanes_at_different_instructions_do_not_meet),
    ("tensor_cores.cpp", "a[group + 8][k]", "a[group + 8][k ^ 1]",
     lambda: tensor_cores.test_products_of_halves("bf16", 16)),
    ("tensor_cores.cpp", "& 0xffffe000u", "& 0xffffffffu",
     lambda: tensor_cores.test_tf32_ignores_the_lowest_digits(8)),
    ("tensor_cores.cpp", "low = any.transposed ? matrix[column][row] :",
     "low = any.transposed ? matrix[row][column] :",
     lambda: tensor_cores.test_ldmatrix(4, ".trans")),
    ("machine.h", "if (stamp.generation != machine.generation) return true;", "return true;",
     mistake("test_a_write_too_early_after_a_read")),
    ("barriers.cpp", "if (waiting == machine.threads)", "if (true)",
     mistake("test_a_barrier_with_a_count_orders_those_who_came")),
    ("barriers.cpp", "if (barrier.aligned) check_aligned(barrier);", "",
     mistake("test_lanes_of_a_warp_at_two_barriers")),
    ("shadow.h", "cell.readers = reader_sets.with(cell.readers, stamp, t);", "cell.read = stamp;",
     mistake("test_reads_of_many_threads_are_all_remembered")),
    ("memory.h", "bytes <= after->bytes - (address - after->address)", "true",
     bound("test_an_access_that_ends_outside")),
    ("launch.cpp", "(b.writable ? memory.writable : memory.read_only)", "memory.writable",
     bound("test_a_write_to_what_may_only_be_read")),
    ("memory.h", "cell->write.generation < machine.block_start, 0)",
     "cell->write.generation == 0, 0)",
     bound("test_shared_memory_of_the_block_before_is_gone")),
    ("copies.cpp", "++memory.shared_cells[to - shared_start + i].copying", "(void)0",
     mistake("test_asynchronous_copies", "sequential")),
    ("copies.cpp", "while (t.groups.size() > groups_left)", "while (!t.groups.empty())",
     mistake("test_asynchronous_copies", "sequential")),
    ("order.cpp", "if (semantics & release) fence", "fence",
     ordering("test_the_last_block_adds_up", "sequential")),
    ("order.cpp", "if (orders(p, l) || access == strong) return;", "return;",
     ordering("test_the_last_block_adds_up", "sequential")),
    ("order.cpp", "if (sequential) add_sequential_fence(t);", "add_sequential_fence(t);",
     ordering("test_every_thread_fences_and_one_counts")),
    ("order.cpp", "return stamp.tick < p.tick;", "return true;",
     ordering("test_a_fence_orders_only_what_came_before_it")),
    ("order.cpp", "return ++t.tick;", "return t.tick + 1;",
     ordering("test_a_fence_orders_only_what_came_before_it")),
    ("shadow.h", "rewrites && cell.write.line == line", "rewrites",
     ordering("test_the_same_number_from_two_instructions", "shared")),
    ("shadow.h", "rewrites && cell.write.line == line", "cell.write.line == line",
     ordering("test_different_numbers_from_one_instruction", "shared")),
    ("launch.cpp", "memory.shared_cells[at].copying = nobody", "(void)0",
     bound("test_off_by_one_between_two_shared_variables")),
]  # fmt: skip


def _loosely(text):
    """A pattern for the text, however the lines are broken."""
    return r"\s*".join(re.escape(word) for word in text.split())


@pytest.mark.parametrize(
    ("file", "old", "new", "check"),
    [
        pytest.param(*r, id=f"{r[0]}-{i}", marks=[] if i in (8, 15) else exhaustive)
        for i, r in enumerate(RUNTIME)
    ],
)
def test_a_spoilt_line_of_the_runtime_is_noticed(monkeypatch, tmp_path, file, old, new, check):
    folder = tmp_path / "runtime"
    shutil.copytree(build.RUNTIME, folder)
    text = (folder / file).read_text()
    spoilt, count = re.subn(_loosely(old), lambda _: new, text)
    assert count >= 1, f"{file} has no {old!r} any more"
    (folder / file).write_text(spoilt)
    monkeypatch.setattr(build, "_RUNTIME_FLAGS", ["-O0", "-frounding-math"])
    monkeypatch.setitem(conformance.MODULE_OPTIONS, "runtime", folder)
    with pytest.raises((AssertionError, pytest.fail.Exception, ExecutionError)):
        check()
