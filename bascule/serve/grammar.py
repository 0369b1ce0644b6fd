"""Answers that must follow a form: a JSON schema, a regular expression, a choice, a tool call. Through llguidance.

The grammar binds the answer, not the thought: a model that thinks may think freely first, and what follows `</think>` is bound.
llguidance is an extra (`pip install bascule[grammar]`); without it such a request is refused, not answered without its form.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bascule.data.tokenizer import Tokenizer
from bascule.errors import UsageError

llguidance: Any
try:
    llguidance = importlib.import_module("llguidance")
except ModuleNotFoundError:  # an extra; `compile_form` says so to whoever asks for it
    llguidance = None

# Spaces between JSON's parts are not left to the model: a small one can fill its whole budget with them.
COMPACT = {"whitespace_flexible": False}


def compile_form(form: dict[str, Any]) -> str:
    """A form ({"json": schema} | {"regex": text} | {"choice": [texts]} | {"lark": text}) as a grammar llguidance reads.

    Raises UsageError with llguidance's own words when it does not understand the form.
    """
    if llguidance is None:
        raise UsageError(
            "Answers that must follow a form need llguidance. Install it where the server runs: pip install 'bascule[grammar]'."
        )
    ((kind, value),) = form.items()
    matcher = llguidance.LLMatcher
    try:
        if kind == "json":
            grammar = matcher.grammar_from_json_schema(value, defaults=COMPACT)
        elif kind == "regex":
            grammar = matcher.grammar_from_regex(value)
        elif kind == "choice":
            grammar = matcher.grammar_from_lark(
                "start: " + " | ".join(json.dumps(one) for one in value)
            )
        else:
            grammar = matcher.grammar_from_lark(value)
    except ValueError as error:
        raise UsageError(f"The form of the answer was not understood: {error}.") from None
    trouble = matcher.validate_grammar(grammar)
    if trouble:
        raise UsageError(f"The form of the answer was not understood: {trouble.strip()}")
    return str(grammar)


def call_form(tools: Sequence[dict[str, Any]], *, free: bool) -> dict[str, Any]:
    """The form of a call to one of `tools`: {"name": ..., "arguments": {...}}. `free`: plain text is allowed instead."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["name"]},
                "arguments": tool.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if not free:
        return {"json": schema}
    inner = json.dumps({**schema, "x-guidance": COMPACT})
    return {"lark": f"start: call | text\ncall: %json {inner}\ntext: /[^{{](?s:.*)/"}


class Grammars:
    """Makes constraints for one vocabulary; `rows` of the embedding may exceed its tokens. Building the vocabulary's trie costs a moment, so it is done once, when first needed."""

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        self._tokenizer = tokenizer
        self._rows = rows
        self._vocabulary: Any = None

    def constraint(self, grammar: str, *, may_think: bool, thinking: bool) -> Bound:
        """`may_think`: the answer may open with a thought; `thinking`: the prompt has opened one."""
        if self._vocabulary is None:
            self._vocabulary = llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._rows))
            )
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        return Bound(matcher, self._tokenizer, self._rows, may_think=may_think, thinking=thinking)


class Bound:
    """One answer under a grammar; see infer.batch.Constraint."""

    def __init__(
        self, matcher: Any, tokenizer: Tokenizer, rows: int, *, may_think: bool, thinking: bool
    ) -> None:
        self._matcher = matcher
        self._open, self._close = tokenizer.think_open_id, tokenizer.think_close_id
        self._eos = tokenizer.eos_id
        tags = self._open >= 0 and self._close >= 0  # not every vocabulary has them as tokens
        self._thinking = thinking and tags
        self._may_open = may_think and tags
        self._plain = np.arange(rows) < tokenizer.vocab_size
        self._plain[list(tokenizer.control_ids)] = False

    def allowed(self) -> NDArray[np.bool_]:
        if self._thinking:
            allowed = self._plain.copy()
            allowed[self._close] = True
            return allowed
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8) > 0
        if self._may_open:
            allowed = allowed.copy()
            allowed[self._open] = True
        return allowed

    def take(self, token: int) -> None:
        if self._may_open and token == self._open:
            self._thinking = True
        elif self._thinking:
            self._thinking = token != self._close
        elif token != self._eos or not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        self._may_open = False

    def trouble(self) -> str:
        """llguidance gives up on a grammar that grows too large, and one with characters that no token spells. It then allows the end."""
        return _first_words(self._matcher.get_error()) if self._matcher.is_error() else ""


def _first_words(error: object) -> str:
    """Without the state of its parser, which llguidance appends for its makers."""
    return str(error).partition("<state>")[0].strip()


class _Vocabulary:
    """What llguidance asks of a tokenizer. Tokens that no text is made of are marked by the byte it reserves for them."""

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = [
            *sorted(tokenizer.control_ids),
            *range(tokenizer.vocab_size, rows),
        ]
        special = set(self.special_token_ids)
        self.tokens = [
            f"\xff<{at}>".encode("latin-1") if at in special else tokenizer.bytes_of(at)
            for at in range(rows)
        ]

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(plain, replace_unknown=True)
