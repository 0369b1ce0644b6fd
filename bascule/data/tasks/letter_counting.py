"""Counting a letter in a few words: the thought spells the text again and writes the running count after every hit.

e in the green sea  ->  <think>the1 gre2e3n se4a</think>4
"""

from __future__ import annotations

from collections.abc import Sequence

from bascule.data import chat
from bascule.data.tasks import gym
from bascule.data.tasks.base import Options, Problem
from bascule.data.tasks.direct import OPTION, answers_directly

_DEFAULTS = {"min_words": 2, "max_words": 4}


class LetterCounting:
    """Options: reasoning-gym's (`min_words`, `max_words`) and `direct_ratio`. Its texts are spans of one public-domain story."""

    name = "letter_counting"

    def problems(self, seed: int, count: int, options: Options) -> list[Problem]:
        settings, own = gym.settings(self.name, options, _DEFAULTS, OPTION)

        def convert(entry: gym.Entry) -> Problem | None:
            letter, words = entry["metadata"]["target_letter"], entry["metadata"]["span"]
            text = " ".join(words).lower()
            if not text.isascii():
                return None  # the vocabulary is ASCII; the story has a few accented names
            return Problem(
                task=self.name, question=f"{letter} in {text}", answer=entry["answer"], key=f"{letter}:{text}",
                difficulty=len(words), metadata={"letter": letter, "text": text, **own},
            )  # fmt: skip

        return gym.distinct(self.name, seed, count, settings, convert)

    def verify(self, problem: Problem, completion_text: str) -> float:
        return gym.verify(self.name, problem, completion_text)

    def verify_many(
        self, problems: Sequence[Problem], completion_texts: Sequence[str]
    ) -> list[float]:
        return gym.verify_many(self.name, problems, completion_texts)

    def trace(self, problem: Problem, key: int) -> str | None:
        spelled, count = "", 0
        for character in problem.metadata["text"]:
            count += character == problem.metadata["letter"]
            spelled += (
                f"{character}{count}" if character == problem.metadata["letter"] else character
            )
        return chat.completion("" if answers_directly(problem, key) else spelled, str(count))


task = LetterCounting()
