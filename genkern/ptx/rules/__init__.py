"""Every instruction that the executor knows. What is not here is refused."""

from genkern.ptx.rules import comparisons, control, conversions, floats, halves, integers, warps
from genkern.ptx.rules import memory as memory_rules
from genkern.ptx.rules.table import Rule, Table

TABLE = Table(
    [
        *integers.RULES,
        *comparisons.RULES,
        *floats.RULES,
        *halves.RULES,
        *conversions.RULES,
        *memory_rules.RULES,
        *warps.RULES,
        *control.RULES,
    ]
)

__all__ = ["TABLE", "Rule", "Table"]
