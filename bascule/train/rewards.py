"""From sampled token ids to rewards, through the verifier of each problem's own task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bascule.data.tasks import registry
from bascule.data.tasks.base import Problem
from bascule.data.tokenizer import Tokenizer


def verifier(
    problems: Sequence[Problem], tokenizer: Tokenizer
) -> Callable[[Sequence[int], Sequence[list[int]]], list[float]]:
    """A reward function for Grpo: (problem index, completion ids) of each sample to 0..1.

    A completion without its end token was cut off and earns nothing, whatever it says so far. Equal answers to one problem
    are verified once: late in training most of a group agrees. The rest of a rollout goes to its tasks in one call.
    """

    def reward(owners: Sequence[int], completions: Sequence[list[int]]) -> list[float]:
        samples = [(at, tuple(ids)) for at, ids in zip(owners, completions, strict=True)]
        ended = [one for one in dict.fromkeys(samples) if one[1][-1:] == (tokenizer.eos_id,)]
        asked = [problems[at] for at, _ in ended]
        said = [tokenizer.completion(list(ids[:-1])) for _, ids in ended]
        paid = dict(zip(ended, registry.verify_many(asked, said), strict=True))
        return [paid.get(sample, 0.0) for sample in samples]

    return reward
