"""Score a model on problems whose answers can be checked. Token ids only; what is right, the caller's verifier says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import comb
from typing import Protocol

from bascule.infer.samples import GREEDY, Answer, Sample, SampleStore, Verifier
from bascule.infer.sampling import Sampling
from bascule.infer.sequence import Completion

Z_95 = 1.959964
STORED_AT_ONCE = 32
"""Problems sampled between two writes to the store: enough to fill a batch, few enough to lose."""


class Generates(Protocol):
    """An engine, here or in another process."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        group_size: int = 1,
        first_index: int = 0,
    ) -> list[Completion]: ...


@dataclass(frozen=True)
class Score:
    """`pass_at[k]` is the unbiased estimate over all problems; `majority` the share solved by the commonest answer of all samples
    (maj@samples); `truncated_ratio` counts sampled completions that never ended; `each` is pass@1 of every problem."""

    problems: int
    samples: int
    pass_at: dict[int, float]
    greedy: float
    truncated_ratio: float
    mean_tokens: float
    majority: float | None = None
    each: list[float] = field(default_factory=list)

    @property
    def pass_at_1(self) -> float:
        return self.pass_at[1]

    def interval(self, share: float) -> tuple[float, float]:
        """95 % of a share of these problems, by Wilson's score with one trial a problem: samples of one problem are no independent
        evidence about others, so for pass@1 of many samples it is somewhat too wide, never too narrow."""
        return wilson(share, self.problems)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that k of `samples` drawn without replacement hold a right one: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def wilson(share: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) for a share of `trials`; never empty, also at 0 and 1."""
    if not trials:
        return 0.0, 1.0
    spread = Z_95**2 / trials
    middle = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def majority(samples: Sequence[Sample]) -> float:
    """Is the commonest answer right? Between answers equally common the vote is split; unfinished samples do not vote."""
    votes = Counter(sample.answer for sample in samples if sample.finish == "stop")
    if not votes:
        return 0.0
    top = [answer for answer, count in votes.items() if count == max(votes.values())]
    right = {sample.answer for sample in samples if sample.right}
    return sum(answer in right for answer in top) / len(top)


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
    answer: Answer | None = None,
    store: SampleStore | None = None,
) -> Score:
    """`samples` completions of every prompt at `temperature`, and one greedy one. A k above `samples` is left out.

    `answer` adds the majority vote. With `store` every sample is written as it finishes, and those written before are not drawn
    again; which draws a sample owns does not depend on where an evaluation was interrupted.
    """
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed, purpose=purpose)
    ask = _Asker(engine, prompts, verify, answer or (lambda tokens: ""))
    found = ask(sampling, samples, first_number=0, store=store)
    best = ask(Sampling(temperature=0.0, max_tokens=max_tokens), 1, first_number=GREEDY, store=store) if greedy else []  # fmt: skip
    right = [sum(sample.right for sample in of_one) for of_one in found]
    drawn = [sample for of_one in found for sample in of_one]
    return Score(
        problems=len(prompts),
        samples=samples,
        pass_at={
            k: _mean([pass_at_k(samples, count, k) for count in right]) for k in ks if k <= samples
        },
        greedy=_mean([float(sample.right) for [sample] in best]),
        truncated_ratio=_mean([float(sample.finish == "length") for sample in drawn]),
        mean_tokens=_mean([float(len(sample.tokens)) for sample in drawn]),
        majority=_mean([majority(of_one) for of_one in found]) if answer else None,
        each=[count / samples for count in right],
    )


@dataclass(frozen=True)
class _Asker:
    engine: Generates
    prompts: Sequence[Sequence[int]]
    verify: Verifier
    answer: Callable[[list[int]], str]

    def __call__(
        self, sampling: Sampling, count: int, *, first_number: int, store: SampleStore | None
    ) -> list[list[Sample]]:
        """`count` samples of every problem, numbered from `first_number`; from the store where it has them all."""
        numbers = range(first_number, first_number + count)
        if store is None:
            return self._draw(range(len(self.prompts)), sampling, numbers)
        held = {
            at: [s for s in store.of(at) if s.number in numbers] for at in range(len(self.prompts))
        }
        missing = [at for at, known in held.items() if len(known) < count]
        for start in range(0, len(missing), STORED_AT_ONCE):
            for run in _runs(missing[start : start + STORED_AT_ONCE]):
                for of_one in self._draw(run, sampling, numbers):
                    known = {sample.number for sample in held[of_one[0].problem]}
                    store.add([sample for sample in of_one if sample.number not in known])
                    held[of_one[0].problem] = of_one
        return [held[at] for at in range(len(self.prompts))]

    def _draw(self, problems: Sequence[int], sampling: Sampling, numbers: range) -> list[list[Sample]]:  # fmt: skip
        count = len(numbers)
        done = self.engine.generate(
            [self.prompts[at] for at in problems],
            sampling,
            group_size=count,
            first_index=problems[0] * count if problems else 0,
        )
        return [
            [
                Sample.of(at, number, done[place * count + turn], self.verify, self.answer)
                for turn, number in enumerate(numbers)
            ]
            for place, at in enumerate(problems)
        ]


def _runs(problems: Sequence[int]) -> list[list[int]]:
    """Neighbouring numbers together: their draws are neighbours, and one call asks for them."""
    parted = groupby(enumerate(problems), key=lambda pair: pair[1] - pair[0])
    return [[at for _, at in group] for _, group in parted]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
