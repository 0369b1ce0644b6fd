"""What the engine takes and gives, and how it travels as JSON. No torch here.

The three values live in `records` because the trainer speaks them too and may not import this room.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from bascule import draws
from bascule.errors import UsageError
from bascule.records import Completion, RolloutReply, RolloutRequest

__all__ = [
    "Completion",
    "RolloutReply",
    "RolloutRequest",
    "LEAST_TEMPERATURE",
    "SPAN",
    "Sampling",
    "reply_from_json",
    "request_from_json",
    "to_json",
]


SPAN = 1 << 20  # random numbers reserved for one sequence; no completion may be longer
LEAST_TEMPERATURE = 1e-5
"""Below it logits divided by the temperature overflow; 0 is greedy and divides by nothing."""


@dataclass(frozen=True)
class Sampling:
    """How to pick tokens. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch the cuts off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 64
    seed: int = 0
    purpose: str = "rollout"
    step: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_k", self.top_k, 0, 1 << 31),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("max_tokens", self.max_tokens, 0, SPAN),
        ):
            if not low <= value <= high:
                raise UsageError(f"{name}={value} is outside {low} to {high}.")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UsageError(
                f"temperature={self.temperature} is too small to divide by; at least {LEAST_TEMPERATURE:g} is allowed, or 0 for the likeliest token."
            )

    @cached_property
    def key(self) -> int:
        return draws.key(self.seed, f"sample.{self.purpose}", self.step)

    @property
    def edits_logits(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


def to_json(value: RolloutRequest | RolloutReply) -> dict[str, Any]:
    return asdict(value)


def request_from_json(value: dict[str, Any]) -> RolloutRequest:
    """Raises TypeError for unknown or missing keys: the two ends run different versions."""
    return RolloutRequest(**value)


def reply_from_json(value: dict[str, Any]) -> RolloutReply:
    """Floats survive exactly: JSON writes the shortest text that reads back to the same float64."""
    completions = [Completion(**item) for item in value["completions"]]
    return RolloutReply(**{**value, "completions": completions})
