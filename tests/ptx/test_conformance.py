"""Every arithmetic rule against exact arithmetic: the cases lie in the *_cases modules."""

import ptx_comparison_cases as comparisons
import ptx_conformance as conformance
import ptx_conversion_cases as conversions
import ptx_float_cases as floats
import ptx_half_cases as halves
import ptx_integer_cases as integers
import pytest

SUBJECTS = [integers, floats, halves, conversions, comparisons]


@pytest.mark.parametrize("cases", SUBJECTS, ids=lambda m: m.__name__)
def test_instructions_give_what_exact_arithmetic_gives(cases):
    assert conformance.mismatches(cases.CASES) == []


def test_a_wrong_expectation_is_noticed():
    case = conformance.Case(
        "add.u32 {d}, {a}, {b}",
        "b32",
        ("b32", "b32"),
        ("32", "32"),
        lambda a, b: a - b & 0xFFFFFFFF,
    )
    assert len(conformance.mismatches([case])) == 1
