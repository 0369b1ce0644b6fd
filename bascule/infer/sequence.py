"""What the engine takes and gives, and how it travels as JSON. No torch here.

The three values live in `records` because the trainer speaks them too and may not import this room.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bascule.records import Completion, RolloutReply, RolloutRequest

__all__ = [
    "Completion",
    "RolloutReply",
    "RolloutRequest",
    "reply_from_json",
    "request_from_json",
    "to_json",
]


def to_json(value: RolloutRequest | RolloutReply) -> dict[str, Any]:
    return asdict(value)


def request_from_json(value: dict[str, Any]) -> RolloutRequest:
    """Raises TypeError for unknown or missing keys: the two ends run different versions."""
    return RolloutRequest(**value)


def reply_from_json(value: dict[str, Any]) -> RolloutReply:
    """Floats survive exactly: JSON writes the shortest text that reads back to the same float64."""
    completions = [Completion(**item) for item in value["completions"]]
    return RolloutReply(**{**value, "completions": completions})
