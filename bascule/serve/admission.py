"""May a foreign engine speak for this model? Every log-probability of fixed texts, prompts and greedy answers, is held against ours.

Greedy tokens alone would not do: with a wrong rotation a small model still says the same words, and the difference of its
log-probabilities looks like bf16 noise. So the engine computes in fp32 while it is examined, and the bound is the rounding measured on
the very texts. A model whose positions hardly matter could hide a wrong rotation: the examination is void unless leaving the
rotation out altogether would have been seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bascule import draws
from bascule.infer.reference import MARGIN, Reference
from bascule.serve.engines import Heard

ANSWER_TOKENS = 24
LENGTHS = (
    8,
    24,
    48,
    80,
    200,
    500,
)  # of the made-up texts; those beyond the model's context are left out


@dataclass(frozen=True)
class Finding:
    """`where` names the worst token of all. `power`: the largest difference that a rotation left out would make."""

    accepted: bool
    reading: float
    speaking: float
    bound: float
    power: float
    tokens: int
    greedy_equal: int
    greedy: int
    where: str

    def told(self, engine: str, cure: str) -> str:
        figures = (
            f"{self.tokens} tokens: log-probabilities differ by {self.reading:.1e} at most while reading and {self.speaking:.1e} while "
            f"speaking ({self.where}); {self.bound:.1e} is allowed, {MARGIN:g} times the rounding measured on these texts; "
            f"{self.greedy_equal} of {self.greedy} greedy tokens are ours. A rotation left out would show {self.power:.1e}."
        )
        if self.accepted:
            return f"{engine} is admitted. {figures}"
        if self.power <= self.bound:
            return f"{engine} cannot be judged: these texts would not show a wrong rotation. {figures} Train the model first."
        return f"{engine} does not compute this model and is refused. {figures} {cure}".rstrip()


def prompts(reference: Reference, questions: Sequence[Sequence[int]]) -> list[list[int]]:
    """The questions, and made-up texts of growing length: far positions are where rotations go wrong."""
    config = reference.model.config
    room = config.max_position_embeddings - ANSWER_TOKENS
    made = [
        [
            int(number * config.vocab_size)
            for number in draws.uniform(draws.key(at, "admission"), (length,))
        ]
        for at, length in enumerate(LENGTHS)
        if length <= room
    ]
    return [list(one) for one in questions if len(one) <= room] + made


def examine(
    ask: Callable[[Sequence[int], int], Heard], reference: Reference, texts: Sequence[Sequence[int]]
) -> Finding:
    """`ask(prompt, tokens)` is the engine. Raises CheckFailed when it cannot answer."""
    reading = speaking = floor = power = 0.0
    worst, where, tokens, equal, greedy = -1.0, "", 0, 0, 0
    for number, prompt in enumerate(texts):
        heard = ask(prompt, ANSWER_TOKENS)
        text = [*prompt, *heard.said]
        ours_TV = reference.opinion(text).logprobs_TV[:-1]
        ours_T = ours_TV.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        theirs_T = torch.tensor([*heard.prompt_logprobs, *heard.logprobs], dtype=torch.float64)
        difference_T = (ours_T - theirs_T).abs().nan_to_num(nan=torch.inf)
        border = len(prompt) - 1
        reading = max(reading, float(difference_T[:border].max()))
        speaking = max(speaking, float(difference_T[border:].max()))
        at = int(difference_T.argmax())
        if float(difference_T[at]) > worst:
            worst = float(difference_T[at])
            where = f"worst at token {at + 1} of text {number}: {ours_T[at]:.6f} is right, {theirs_T[at]:.6f} was said"
        equal += int((ours_TV[border:].argmax(1) == torch.tensor(heard.said)).sum())
        greedy += len(heard.said)
        tokens += len(text) - 1
        floor = max(floor, reference.floor(text))
        power = max(power, float((reference.unturned(text) - ours_TV).abs().max()))
    bound = MARGIN * floor
    accepted = max(reading, speaking) <= bound < power
    return Finding(accepted, reading, speaking, bound, power, tokens, equal, greedy, where)
