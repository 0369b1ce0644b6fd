"""Every sample of an evaluation, on disk as it finishes, so that an interrupted evaluation goes on where it stopped.

One JSON object a line. The file's name must say what was asked (model, problems, number of samples): here nothing is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bascule.infer.sequence import Completion

Verifier = Callable[[int, list[int]], float]
"""(number of the problem, completion's tokens) to reward; 1 is right."""
Answer = Callable[[list[int]], str]
"""The final answer in a completion's tokens, as text: what a majority votes on."""
GREEDY = -1
"""The sample number of the greedy completion."""


@dataclass(frozen=True)
class Sample:
    """An unfinished completion is wrong whatever it says: nobody could have read its answer."""

    problem: int
    number: int
    finish: str
    right: bool
    answer: str
    tokens: list[int]

    @classmethod
    def of(cls, problem: int, number: int, done: Completion, verify: Verifier, answer: Answer) -> Sample:  # fmt: skip
        ended = done.finish == "stop"
        right = ended and verify(problem, done.tokens) >= 1.0
        said = answer(done.tokens) if ended else ""
        return cls(problem, number, done.finish, right, said, list(done.tokens))


class SampleStore:
    """Append-only; a line torn by a kill is left out and asked again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[int, list[Sample]] = {}
        whole = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        for line in whole:
            if line.endswith("\n"):
                sample = Sample(**json.loads(line))
                self._known.setdefault(sample.problem, []).append(sample)
        if whole and not whole[-1].endswith("\n"):
            path.write_text("".join(whole[:-1]), encoding="utf-8")

    def of(self, problem: int) -> list[Sample]:
        return self._known.get(problem, [])

    def add(self, samples: Sequence[Sample]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(asdict(sample), separators=(",", ":")) + "\n")
                self._known.setdefault(sample.problem, []).append(sample)
