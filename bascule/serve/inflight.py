"""What is on its way between the routes and the engine: requests, tokens, texts to score, and the chips that may work on them. No torch."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Protocol

from bascule.infer.sequence import Sampling

Marks = list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Candidate:
    """A pool that may answer, in the order of preference. `verdict` and `reasons` are of the run's ledger."""

    pool: str | None
    accelerator: str
    verdict: str | None = None
    verdict_id: str | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Said:
    """One token of one choice. `tops`: chosen token first, then the likeliest, as (token, log-probability at T=1)."""

    choice: int
    token: int
    logprob: float
    tops: list[tuple[int, float]] | None
    finish: str | None


class Refused(Exception):
    """The engine cannot take or finish a request. `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class Ticket:
    """One request in flight: its choices, what each has said, and the queue its tokens come through.

    `dtype` is that of the engine it was handed to first.
    """

    id: int
    prompt: list[int]
    sampling: Sampling
    top: int | None
    form: dict[str, Any] | None
    said: list[list[int]]
    open: set[int]
    dtype: str
    submitted_s: float = field(default_factory=time.monotonic)
    cached_tokens: int = 0
    moves: int = 0
    logprobs: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    arrivals: asyncio.Queue[Said | Refused] = field(default_factory=asyncio.Queue)


@dataclass(frozen=True)
class Answer:
    """A finished choice and what the engine said about its tokens, at the temperature it sampled with."""

    prompt: list[int]
    said: list[int]
    logprobs: list[float]
    temperature: float


class Referee(Protocol):
    """Another kind of chip that holds the same model."""

    async def worst_difference(self, answer: Answer) -> float:
        """Largest |difference| of the log-probabilities of an answer's tokens. Raises Refused when it cannot say."""
        ...

    async def close(self) -> None: ...
