"""One sequence on its way from its prompt to its last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bascule.infer.sampling import Draws, Sampling


class Constraint(Protocol):
    """What a row may say next, when that is not up to the model alone (a grammar). It sees every token in order."""

    def allowed(self) -> NDArray[np.bool_]:
        """True for every token of the vocabulary that may come now; at least one."""
        ...

    def take(self, token: int) -> None: ...

    def trouble(self) -> str:
        """Why the answer can no longer follow the grammar, "" while it can. Such a row ends."""
        ...


@dataclass(eq=False)
class Row:
    """`said` are the tokens of the completion so far; `finish` is set when it ends. `blocks` hold the first `read` tokens;
    `arrived` is its number in the order of arrival. `unpaired`: the hidden states of the tokens read last that the prediction layer
    has not paired yet (draft.py), the newest last; None for a row without guesses.

    A row may begin with tokens said already (an engine that failed said them, or the row was preempted): they are read again,
    and its random numbers go on where they left off. `top`: how many alternatives to note in `tops` for each token, None for
    no note. `trouble`: why its grammar could not be followed, with the finish "form".
    """

    prompt: Sequence[int]
    sampling: Sampling
    index: int = 0
    top: int | None = None
    constraint: Constraint | None = None
    said: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: str | None = None
    trouble: str = ""
    read: int = 0
    blocks: list[int] = field(default_factory=list)
    arrived: int = 0
    unpaired: list[Tensor] | None = None

    def __post_init__(self) -> None:
        self.draws = Draws(self.sampling, self.index)
        if self.constraint is not None:
            for token in self.said:
                self.constraint.take(token)

    @property
    def text(self) -> list[int]:
        """All tokens so far."""
        return [*self.prompt, *self.said]

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.said)

    @property
    def most(self) -> int:
        """Tokens it may grow to."""
        return len(self.prompt) + self.sampling.max_tokens

    def token(self, at: int) -> int:
        known = len(self.prompt)
        return self.prompt[at] if at < known else self.said[at - known]
