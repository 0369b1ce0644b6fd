"""One family is imported without the others, and all of them are there when they are asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bascule.data.tasks import gym_datasets

ALONE = """
import sys
from bascule.data.tasks import registry
[problem] = registry.get("chain_sum").problems(1, 1, {})
assert registry.verify(problem, registry.get("chain_sum").trace(problem, 0)) == 1.0
assert "sympy" not in sys.modules and "matplotlib" not in sys.modules and "reasoning_gym" not in sys.modules
import reasoning_gym
from bascule.data.tasks import gym_datasets
from reasoning_gym.factory import DATASETS
assert reasoning_gym.create_dataset("chain_sum", seed=0, size=1)[0] == gym_datasets.create("chain_sum", seed=0, size=1)[0]
assert set(gym_datasets.names()) == set(DATASETS) and len(DATASETS) > 100
"""

EACH = """
import sys
from bascule.data.tasks import gym_datasets
dataset, config = gym_datasets.kind(sys.argv[1])
assert (dataset.__module__.startswith("reasoning_gym."), config.__module__) == (True, dataset.__module__)
print("whole" if "reasoning_gym" in sys.modules else "alone")
"""


def test_a_task_imports_its_category_alone_and_the_whole_library_still_imports_after_it() -> None:
    subprocess.run([sys.executable, "-c", ALONE], check=True)


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("countdown", "alone"),
        ("acre", "alone"),
        ("letter_counting", "alone"),
        ("composite", "whole"),
    ],
)
def test_a_family_of_any_category_is_found_in_a_fresh_process(family: str, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EACH, family], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == how


def test_a_name_that_is_no_family_is_a_key_error() -> None:
    for name in ("spell_backwards", "../factory", "__init__"):
        with pytest.raises(KeyError):
            gym_datasets.kind(name)
