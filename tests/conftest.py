"""What every test needs: one thread (two runnable test processes with two OpenMP threads each are slower than one)."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

LONG = (
    "test_tiny.py",
    "qualify/test_truth_table.py",
    "stages/test_exact_resume.py",
    "serve/test_server.py",
    "qualify/test_battery.py",
    "stages/test_endings.py",
    "stages/test_whatever_happens.py",
    "stages/test_origin.py",
)
"""Files of few, long tests. They go first: begun last, they keep one core busy for minutes while the other waits."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    rank = {here / name: at for at, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def guarded() -> ModuleType:
    """tests/guarded.py, the small run under the guard; imported when a test asks, not whenever tests are collected."""
    return importlib.import_module("tests.guarded")
