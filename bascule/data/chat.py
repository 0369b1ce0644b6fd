"""The chat format and the thought inside it. The only file that knows the tags.

    <bos><system>…<user>9-8+0+7=?<assistant><think>9-8=1,1+0=1,1+7=8</think>8<eos>

Earlier thoughts are left out when a conversation goes on (as DeepSeek-R1's template does): an assistant turn in the history
keeps only what follows `</think>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from bascule.errors import UsageError, nearest

BOS, EOS = "<bos>", "<eos>"
SYSTEM, USER, ASSISTANT = "<system>", "<user>", "<assistant>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

HALF_A_CHARACTER: Final = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: JSON can spell it and Python's json reads it, but UTF-8 has no bytes for it and no tokenizer takes it."""

_MARKS: Final = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}

TEMPLATE: Final = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<assistant>' + (message['content'].split('</think>') | last | trim) + '<eos>' }}"
    "{% elif message['role'] in ['system', 'user'] %}"
    "{{ '<' + message['role'] + '>' + (message['content'] | trim) }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""Jinja for tokenizer_config.json: renders what `render` renders (tested)."""


def render(messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
    """Messages (`role`, `content`) as the text the model reads. With `add_generation_prompt` it ends where the answer begins."""
    parts = [BOS]
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in _MARKS:
            raise UsageError(
                f"A message has the role '{role}'; allowed: {', '.join(_MARKS)}.{nearest(role, _MARKS)}"
            )
        if role == "assistant":
            content = content.rsplit(THINK_CLOSE, 1)[-1]
        parts += [_MARKS[role], content.strip(), EOS if role == "assistant" else ""]
    if add_generation_prompt:
        parts.append(ASSISTANT)
    return "".join(parts)


def prompt(question: str) -> str:
    """The text that asks one question and waits for the answer."""
    return render([{"role": "user", "content": question}], add_generation_prompt=True)


def completion(reasoning: str, answer: str) -> str:
    """What a model should write: one thought (may be empty), then the answer. The end token is not part of the text."""
    return f"{THINK_OPEN}{reasoning}{THINK_CLOSE}{answer}"


_STRICT = re.compile(r"<think>([^<]*)</think>([^<]+)")


def parse_strict(text: str) -> tuple[str, str] | None:
    """(thought, answer) if `text` is exactly one thought followed by a non-empty answer, else None. For verifiers."""
    match = _STRICT.fullmatch(text)
    return (match[1], match[2]) if match else None


def split_reasoning(text: str) -> tuple[str, str]:
    """(thought, answer) of any text, for people and the API: nothing is refused.

    A thought that was cut off leaves an empty answer; no tags at all leave an empty thought; a closing tag without an opening
    one (the prompt held it) makes everything before it the thought. Blank space at the borders is removed.
    """
    close = text.find(THINK_CLOSE)
    opened = close >= 0 and THINK_OPEN not in text[:close]
    splitter = ReasoningSplitter(opened=opened)
    head, tail = splitter.feed(text), splitter.close()
    return (head[0] + tail[0]).strip(), (head[1] + tail[1]).strip()


class ReasoningSplitter:
    """`split_reasoning` for a stream. Feed pieces as they come; a tag may be cut anywhere between pieces.

    Text that could still become a tag is held back until it is decided, so no tag ever leaks into either side. Set `opened`
    when the prompt already opened the thought.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self.thinking = opened
        self._held = ""

    def feed(self, piece: str) -> tuple[str, str]:
        """Return what may be shown now: (thought delta, answer delta)."""
        return self._split(self._held + piece, final=False)

    def close(self) -> tuple[str, str]:
        """The stream has ended: return what was held back."""
        return self._split(self._held, final=True)

    def _split(self, text: str, *, final: bool) -> tuple[str, str]:
        sides = ["", ""]
        for part in re.split(f"({THINK_OPEN}|{THINK_CLOSE})", text):
            if part in (THINK_OPEN, THINK_CLOSE):
                self.thinking = part == THINK_OPEN
                continue
            sides[0 if self.thinking else 1] += part
            last = part
        keep = 0 if final else _possible_tag(last)
        self._held = last[len(last) - keep :]
        if keep:
            side = 0 if self.thinking else 1
            sides[side] = sides[side][:-keep]
        return sides[0], sides[1]


def _possible_tag(text: str) -> int:
    """Length of the longest end of `text` that begins a tag without being one."""
    start = text.rfind("<")
    tail = text[start:] if start >= 0 else ""
    return (
        len(tail) if tail and (THINK_OPEN.startswith(tail) or THINK_CLOSE.startswith(tail)) else 0
    )
