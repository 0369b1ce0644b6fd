"""Which prompts the next rollout asks: an endless shuffled stream, narrowed by difficulty and by what is solved already.

With the defaults it is `choose` and nothing else. What was asked and how it went is state, so that a resumed run asks the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bascule.config.training import GrpoConfig
from bascule.train.objective import choose
from bascule.train.state import StateDict

FIRST_SHARE = 0.25
"""Share of the prompts, the easiest, that `curriculum = "easy_first"` begins with; all are open after half of the steps."""


def open_share(progress: float) -> float:
    """Share of the prompts in play at `progress` (0..1) of the phase."""
    return min(1.0, FIRST_SHARE + (1.0 - FIRST_SHARE) * 2.0 * progress)


class Curriculum:
    """`difficulties` orders the prompts for "easy_first"; without them every prompt is as hard as any other."""

    def __init__(
        self, config: GrpoConfig, count: int, seed: int, difficulties: Sequence[float] | None = None
    ) -> None:
        self.config, self.count, self.seed = config, count, seed
        ranked = np.argsort(np.zeros(count) if difficulties is None else difficulties, kind="stable")  # fmt: skip
        self._rank = np.empty(count, np.int64)
        self._rank[ranked] = np.arange(count)
        self._cursor = 0
        self._solved: dict[int, int] = {}

    @property
    def retired(self) -> set[int]:
        """Prompts whose whole group was right `retire_after` times running (ScaleRL, arXiv 2510.13786, retires at 90 %)."""
        after = self.config.retire_after
        return {prompt for prompt, times in self._solved.items() if after and times >= after}

    def take(self, wanted: int, progress: float) -> list[int]:
        """The next `wanted` prompts. When all that are open are retired, they come back: there is nothing else to ask."""
        retired, limit = self.retired, self._limit(progress)
        open_now = {prompt for prompt in range(self.count) if self._rank[prompt] < limit} - retired
        if not open_now:
            self._solved.clear()
            open_now = {prompt for prompt in range(self.count) if self._rank[prompt] < limit}
        taken: list[int] = []
        while len(taken) < wanted:
            found = choose(self.seed, "grpo.prompts", self._cursor, wanted - len(taken), self.count)
            self._cursor += len(found)
            taken += [prompt for prompt in found if prompt in open_now]
        return taken

    def learn(self, asked: Sequence[int], rewards_PG: NDArray[np.float64]) -> None:
        """Count how often running each prompt's whole group was right."""
        all_right: NDArray[np.bool_] = (rewards_PG >= 1.0).min(axis=1)
        for prompt, solved in zip(asked, all_right.tolist(), strict=True):
            self._solved[prompt] = self._solved.get(prompt, 0) + 1 if solved else 0

    def _limit(self, progress: float) -> int:
        if self.config.curriculum == "none":
            return self.count
        return max(1, round(self.count * open_share(progress)))

    def state_dict(self) -> StateDict:
        return {"cursor": self._cursor, "solved": sorted(self._solved.items())}

    def load_state_dict(self, state: StateDict) -> None:
        self._cursor = int(state["cursor"])
        self._solved = {int(prompt): int(times) for prompt, times in state["solved"]}
