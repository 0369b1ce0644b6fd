"""Entries of reasoning-gym's families whose problems depend on the order of Python's sets, which every process has its own of.

They are drawn in a process apart whose order is fixed, so that a resumed run learns from the same problems and an examination asks
the same ones. A batch costs its start, some two seconds.
"""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from bascule.config.environment import whole_environment
from bascule.data.tasks import gym_datasets

FAMILIES = ("codeio", "isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")  # fmt: skip
AGAIN = 32
"""Entries of a later batch: the first is as large as what is wanted, and most families have few copies."""


def entries(
    name: str, seed: int, size: int, first: int, settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Items 0 to `size` of the family, `first` of them at once."""
    start = 0
    while start < size:
        stop = min(size, start + (AGAIN if start else max(1, first)))
        batch: list[dict[str, Any]] = pickle.loads(
            _drawn(pickle.dumps((name, seed, size, dict(settings), start, stop)))
        )
        yield from batch
        start = stop


@functools.lru_cache(maxsize=4)  # a run asks three times for the same few before it begins
def _drawn(asked: bytes) -> bytes:
    environment = {**whole_environment(), "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=asked, capture_output=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(
            f"Problems of reasoning-gym could not be drawn in a process apart (exit {done.returncode}): {done.stderr.decode(errors='replace')[-2000:]}"
        )
    return done.stdout


def _main() -> None:
    from bascule.data.tasks.gym import seeded

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr  # codeio prints what goes wrong in its snippets
    name, seed, size, settings, start, stop = pickle.load(sys.stdin.buffer)
    dataset = gym_datasets.create(name, seed=seed, size=size, **settings)
    with answers:
        pickle.dump([seeded(dataset, index, seed) for index in range(start, stop)], answers)


if __name__ == "__main__":
    _main()
