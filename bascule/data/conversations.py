"""Chat data for SFT in the `messages` convention: one JSON object a line, {"messages": [{"role": .., "content": ..}, ..]}.

Every assistant turn is an example of its own: the conversation up to it, as the model would read it, then the turn. So loss falls
on responses only, earlier thoughts are left out of the history as they are when the model is used, and a turn may be a whole
`<think>..</think>answer`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bascule.data import chat
from bascule.data.tokenizer import Tokenizer
from bascule.errors import RecipeError, UsageError

Example = tuple[list[int], list[int]]
"""(ids of what is read, ids of what is learnt)."""

NO_TURN = "conversations without an assistant turn after a question"
EMPTY = "empty responses"
TOOLS = "tool calls of turns whose text is learnt"
LOOKED_AT = 1000
"""Conversations that are rendered before a run begins; of the others only the form is looked at."""


def examples(path: Path, tokenizer: Tokenizer, longest: int) -> tuple[list[Example], Counter[str]]:
    """Examples of a file in its order, and what was left out: how often for which reason.

    Raises RecipeError for a line that is no conversation, naming it.
    """
    left_out: Counter[str] = Counter()
    lines = _lines(path)
    return [one for line in lines for one in _learnt(path, line, tokenizer, longest, left_out)], +left_out  # fmt: skip


def check(path: Path, tokenizer: Tokenizer, longest: int) -> None:
    """Is every line a conversation that this tokenizer can spell, and is there something to learn? Raises RecipeError for a line
    that is none, and for a file that leaves nothing."""
    left_out: Counter[str] = Counter()
    held = learnt = 0
    for line in _lines(path):
        if held < LOOKED_AT:
            learnt += len(_learnt(path, line, tokenizer, longest, left_out))
        held += 1
    if not held:
        raise RecipeError(
            f"sft.data = '{path}' holds no conversation. Give one JSON object a line."
        )
    if not learnt and held <= LOOKED_AT:
        reasons = "; ".join(f"{why}, {count}" for why, count in (+left_out).items())
        raise RecipeError(
            f"sft.data = '{path}' leaves nothing to learn: {reasons}. Give conversations in which a question is answered within the model's positions."
        )


def _learnt(
    path: Path,
    line: tuple[int, list[dict[str, str]]],
    tokenizer: Tokenizer,
    longest: int,
    left_out: Counter[str],
) -> list[Example]:
    """The examples of one conversation; what is left out is counted in `left_out`. Raises RecipeError naming the line."""
    number, messages = line
    try:
        turns = list(_turns(messages, tokenizer))
    except UsageError as error:
        raise RecipeError(f"sft.data = '{path}', line {number}: {error}") from None
    left_out[NO_TURN] += not turns
    left_out[TOOLS] += sum(
        bool(message.get("tool_calls")) for message in messages if message["role"] == "assistant"
    )
    found = []
    for read, said in turns:
        if len(said) == 1:
            left_out[EMPTY] += 1
        elif len(read) + len(said) > longest:
            left_out[f"responses beyond model.max_position_embeddings = {longest}"] += 1
        else:
            found.append((read, said))
    return found


def _turns(messages: list[dict[str, str]], tokenizer: Tokenizer) -> Iterator[Example]:
    """A turn that opens the conversation answers nothing and is no example."""
    opened = chat.THINK_OPEN if tokenizer.opens_thought else ""
    for at, message in enumerate(messages):
        if message["role"] == "assistant" and at:
            read = tokenizer.render(messages[:at], add_generation_prompt=True)
            said = tokenizer.encode(message["content"].strip().removeprefix(opened))
            yield tokenizer.encode(read), [*said, tokenizer.eos_id]


def _lines(path: Path) -> Iterator[tuple[int, list[dict[str, str]]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split(
            "\n"
        )  # splitlines() also cuts at U+2028, which JSON allows in a string
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"sft.data = '{path}' cannot be read ({error}). Give the path of a JSON-lines file with `messages`."
        ) from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _messages(path, number, line)


def _messages(path: Path, number: int, line: str) -> list[dict[str, str]]:
    try:
        messages: Any = json.loads(line)["messages"]
    except (json.JSONDecodeError, KeyError, TypeError):
        messages = None
    if chat.HALF_A_CHARACTER.search(json.dumps(messages, ensure_ascii=False)):
        raise RecipeError(
            f"sft.data = '{path}', line {number} holds half of a surrogate pair, which is no text. Mend the line."
        )
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise RecipeError(
            f'sft.data = \'{path}\', line {number} is no {{"messages": [{{"role": .., "content": ..}}, ..]}} with text in every '
            "role and content (no null, no list of parts). Mend the line."
        )
    return messages


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
