"""Every rule of the table has a test: after all others of this folder (see conftest.py), the table
that they share tells what they used."""

import ptx_conformance as conformance
import pytest

# Pattern, and why no test uses the rule.
UNTESTED = {}


def test_every_rule_is_used_by_a_test(request):
    here = request.path.parent
    chosen = {item.path for item in request.session.items}
    missing = [p.name for p in sorted(here.glob("test_*.py")) if p not in chosen]
    if missing or request.session.testsfailed:
        pytest.skip(f"all of tests/ptx must run and pass first; without: {', '.join(missing)}")
    used = conformance.TABLE.used()
    unused = [rule.pattern for rule in conformance.TABLE.rules if rule not in used]
    assert sorted(unused) == sorted(UNTESTED)
