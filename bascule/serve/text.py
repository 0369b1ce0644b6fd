"""From tokens to what a client sees: text, stop strings, and the thought kept apart from the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bascule.data import chat
from bascule.data.tokenizer import Tokenizer
from bascule.errors import UsageError
from bascule.serve.bodies import Message

# The chat format knows three roles: what a tool returned is told to the model as if the user said it.
ROLES = {"developer": "system", "tool": "user"}


@dataclass(frozen=True)
class Piece:
    """What may be shown now. `stopped`: a stop string appeared, nothing follows."""

    thought: str
    answer: str
    stopped: bool = False


class StopFinder:
    """Lets text through up to the first stop string; holds back what could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """(text to show, has a stop string appeared)."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def close(self) -> str:
        held, self._held = self._held, ""
        return held


class Reader:
    """One choice being read: tokens in, pieces out. `split` keeps the thought apart; a raw completion shows everything."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str], *, split: bool
    ) -> None:
        self._stops = StopFinder(stops)
        self._speller = tokenizer.speller()
        opened = split and left_open(prompt, tokenizer)
        self._splitter = chat.ReasoningSplitter(opened=opened) if split else None
        self.tokens = 0
        self.thought_tokens = 0
        self.thought = ""
        self.answer = ""

    def feed(self, token: int, *, last: bool) -> Piece:
        """`last` flushes what was held back."""
        self.tokens += 1
        if self._splitter is not None and self._splitter.thinking:
            self.thought_tokens += 1
        spelled = self._speller.feed(token) + (self._speller.close() if last else "")
        text, stopped = self._stops.feed(spelled)
        if last and not stopped:
            text += self._stops.close()
        thought, answer = self._splitter.feed(text) if self._splitter else ("", text)
        if (last or stopped) and self._splitter:
            more_thought, more_answer = self._splitter.close()
            thought, answer = thought + more_thought, answer + more_answer
        self.thought += thought
        self.answer += answer
        return Piece(thought, answer, stopped)


def chat_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = True
) -> list[int]:
    """Render and encode. Raises UsageError for what this model cannot be told, control tokens smuggled in as text included."""
    plain = [
        {"role": ROLES.get(message.role, message.role), "content": message.text}
        for message in messages
    ]
    for at, message in enumerate(plain):
        _refuse_control(at, message["role"], message["content"], tokenizer)
    return tokenizer.encode(tokenizer.render(plain, add_generation_prompt=add_generation_prompt))


def _refuse_control(at: int, role: str, content: str, tokenizer: Tokenizer) -> None:
    """Text that spells a control token would be read as that token: a user could speak as the system."""
    tags = () if role == "assistant" else (chat.THINK_OPEN, chat.THINK_CLOSE)
    for symbol in (*tokenizer.controls, *tags):
        if symbol in content:
            raise UsageError(
                f"messages[{at}].content holds '{symbol}', which is a control token of this model. Write it differently."
            )


def left_open(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Does the prompt end inside a thought?"""
    for token in reversed(prompt):
        if token in (tokenizer.think_open_id, tokenizer.think_close_id):
            return token == tokenizer.think_open_id
    return False


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
