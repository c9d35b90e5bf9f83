"""What the tests of the executor share: modules beside them that are no tests."""

import importlib.util
import sys
from pathlib import Path


def _load(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"ptx_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


_HERE = Path(__file__).parent
# In this order: a later one imports the earlier ones, as ptx_exact, ptx_conformance, …
for _name in (
    "exact",
    "conformance",
    "integer_cases",
    "float_cases",
    "half_cases",
    "conversion_cases",
    "comparison_cases",
    "test_warps",
    "test_tensor_cores",
    "test_mistakes",
    "test_bounds",
    "test_order",
):
    _load(_name)


def pytest_collection_modifyitems(items):
    """test_rules.py asks what all others have used: it comes last."""
    items.sort(key=lambda item: item.path.name == "test_rules.py" and item.path.parent == _HERE)
