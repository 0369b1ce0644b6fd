"""Texts that the engine only reads once more, to say what the model thinks of their tokens. When it fails, the next engine is asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bascule.serve.inflight import Marks, Refused

CRASHES = 2  # of the engine over the same text; then it is refused


@dataclass(eq=False)
class Scoring:
    """A text whose own tokens are scored, or, with `said`, the marks of what was said after the prompt. `scores` as infer.batch.score or
    infer.stamp.marks give them."""

    id: int
    prompt: list[int]
    top: int
    temperature: float
    said: list[int] = field(default_factory=list)
    crashes: int = 0
    scores: asyncio.Future[Marks] = field(default_factory=asyncio.Future)

    def message(self) -> dict[str, Any]:
        names = ("id", "prompt", "top", "temperature", "said")
        return {"score": {name: getattr(self, name) for name in names}}

    def refuse(self, why: Refused) -> None:
        if not self.scores.done():  # whoever waited may have left
            self.scores.set_exception(why)


class Scorings:
    """Those that wait, by number. `send` reaches the engine; while none is there it may do nothing."""

    def __init__(self, ids: Iterator[int], send: Callable[[dict[str, Any]], None]) -> None:
        self._ids, self._send = ids, send
        self._open: dict[int, Scoring] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def read(
        self, prompt: list[int], *, top: int = 0, temperature: float = 1.0, said: list[int] | None = None
    ) -> Marks:  # fmt: skip
        """Raises Refused when no chip answers, or the engine ends over this text again and again."""
        scoring = Scoring(next(self._ids), prompt, top, temperature, said or [])
        self._open[scoring.id] = scoring
        self._send(scoring.message())
        try:
            return await scoring.scores
        finally:
            del self._open[scoring.id]

    def ask_again(self) -> None:
        for scoring in self._open.values():
            self._send(scoring.message())

    def take(self, job: int, scores: Marks) -> None:
        if job in self._open and not self._open[job].scores.done():
            self._open[job].scores.set_result(scores)

    def crashed(self, why: Refused) -> None:
        """The engine ended by an exception of its own: those that were there before are refused."""
        for scoring in self._open.values():
            scoring.crashes += 1
            if scoring.crashes >= CRASHES:
                scoring.refuse(why)

    def refuse_all(self, why: Refused) -> None:
        for scoring in self._open.values():
            scoring.refuse(why)
