"""Score a model on problems whose answers can be checked. Token ids only; what is right, the caller's verifier says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Protocol

from bascule.infer.sampling import Sampling
from bascule.infer.sequence import Completion

Verifier = Callable[[int, list[int]], float]
"""(number of the problem, completion's tokens) to reward; 1 is right."""


class Generates(Protocol):
    """An engine, here or in another process."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, group_size: int = 1
    ) -> list[Completion]: ...


@dataclass(frozen=True)
class Score:
    """`pass_at[k]` is the unbiased estimate over all problems; `truncated_ratio` counts sampled completions that never ended."""

    problems: int
    samples: int
    pass_at: dict[int, float]
    greedy: float
    truncated_ratio: float
    mean_tokens: float

    @property
    def pass_at_1(self) -> float:
        return self.pass_at[1]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that k of `samples` drawn without replacement hold a right one: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def evaluate(
    engine: Generates,
    prompts: Sequence[Sequence[int]],
    verify: Verifier,
    *,
    samples: int,
    max_tokens: int,
    seed: int,
    ks: Sequence[int] = (1, 8),
    greedy: bool = True,
    temperature: float = 1.0,
    purpose: str = "evaluate",
) -> Score:
    """`samples` completions of every prompt at `temperature`, and one greedy one. A k above `samples` is left out."""
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed, purpose=purpose)
    drawn = engine.generate(prompts, sampling, group_size=samples)
    right = _count_right(drawn, verify, samples)
    best = (
        engine.generate(prompts, Sampling(temperature=0.0, max_tokens=max_tokens)) if greedy else []
    )
    greedy_right = _count_right(best, verify, 1)
    return Score(
        problems=len(prompts),
        samples=samples,
        pass_at={
            k: _mean([pass_at_k(samples, count, k) for count in right]) for k in ks if k <= samples
        },
        greedy=_mean([float(count) for count in greedy_right]),
        truncated_ratio=_mean([float(item.finish == "length") for item in drawn]),
        mean_tokens=_mean([float(len(item.tokens)) for item in drawn]),
    )


def _count_right(
    completions: Sequence[Completion], verify: Verifier, per_problem: int
) -> list[int]:
    """Right completions of each problem. An unfinished one is wrong whatever it says: nobody could have read its answer."""
    counts = [0] * (len(completions) // per_problem)
    for at, item in enumerate(completions):
        if item.finish == "stop" and verify(at // per_problem, item.tokens) >= 1.0:
            counts[at // per_problem] += 1
    return counts


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
