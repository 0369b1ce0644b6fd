"""Loads tests/guarded.py, the small run under the guard that several test folders share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def guarded() -> ModuleType:
    if "guarded" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "guarded", Path(__file__).parents[1] / "guarded.py"
        )
        assert spec is not None and spec.loader is not None
        sys.modules["guarded"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["guarded"])
    return sys.modules["guarded"]
