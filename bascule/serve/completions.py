"""POST /v1/completions: raw text or token ids, continued."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from bascule.data.tokenizer import Tokenizer
from bascule.serve.bodies import CompletionBody
from bascule.serve.broker import Broker
from bascule.serve.errors import ApiError, read
from bascule.serve.service import Ask, Service, usage


class CompletionRoute:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def answer(self, request: Request) -> Response:
        body = await read(request, CompletionBody)
        self.service.check_model(body.model)
        if not body.prompts:
            raise ApiError(400, "The list of prompts is empty.", param="prompt")
        self.service.check_count(len(body.prompts) * body.choices)
        if body.max_tokens == 0:
            if not body.echo or body.stream:
                raise ApiError(
                    400, "max_tokens=0 is for echo=true without stream.", param="max_tokens"
                )
            return await self.service.whole(request, [], self._only_echo(body))
        asks: list[Ask] = []
        try:
            for prompt in body.prompts:
                tokens = self.service.tokens(prompt)
                limit = 16 if body.max_tokens is None else body.max_tokens
                asks.append(
                    self.service.ask(
                        body,
                        tokens,
                        limit,
                        top=body.logprobs,
                        split=False,
                        form=body.structured_outputs.form if body.structured_outputs else None,
                        first_choice=len(asks) * body.choices,
                    )
                )
        except ApiError:
            self.service.cancel(asks)
            raise
        envelope = self._envelope()
        if body.stream:
            return self.service.stream(asks, self._text_chunks(body, asks, envelope))
        return await self.service.whole(request, asks, self._text_answer(body, asks, envelope))

    def _envelope(self) -> dict[str, Any]:
        return {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.service.model,
            "system_fingerprint": self.service.fingerprint,
        }

    async def _only_echo(self, body: CompletionBody) -> dict[str, Any]:
        """No token is asked for: the prompt comes back, scored if its log-probabilities are wanted."""
        self.service.check_queue()
        prompts = [self.service.tokens(prompt) for prompt in body.prompts]
        choices: list[dict[str, Any]] = []
        for tokens in prompts:
            self.service.check_room(tokens, 0, "prompt")
            marks = await self._begin(body, tokens)
            choices.append(
                {
                    "index": len(choices),
                    "text": self.service.tokenizer.decode(tokens),
                    "logprobs": marks.body() if body.logprobs is not None else None,
                    "finish_reason": "length",
                }
            )
        count = sum(map(len, prompts))
        counts = {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}
        return {**self._envelope(), "choices": choices, "usage": counts}

    async def _begin(
        self, body: CompletionBody, prompt: list[int], broker: Broker | None = None
    ) -> _TextMarks:
        """The marks a choice starts with: empty, or the echoed prompt's."""
        marks = _TextMarks()
        if body.echo and body.logprobs is not None:
            marks.add_first(self.service.tokenizer, prompt[0])
            for tops in await self.service.score(prompt, body.logprobs, broker):
                marks.add(self.service.tokenizer, tops)
        return marks

    async def _text_answer(
        self, body: CompletionBody, asks: Sequence[Ask], envelope: dict[str, Any]
    ) -> dict[str, Any]:
        total = sum(len(ask.readers) for ask in asks)
        marks = [
            await self._begin(body, ask.ticket.prompt, ask.broker)
            for ask in asks
            for _ in ask.readers
        ]
        finishes: list[str | None] = [None] * total
        async with aclosing(self.service.spoken(asks)) as stream:
            async for spoken in stream:
                if spoken.said.tops is not None:
                    marks[spoken.choice].add(self.service.tokenizer, spoken.said.tops)
                finishes[spoken.choice] = spoken.finish or finishes[spoken.choice]
        choices = [
            {
                "index": ask.first_choice + at,
                "text": (self.service.tokenizer.decode(ask.ticket.prompt) if body.echo else "")
                + reader.answer,
                "logprobs": marks[ask.first_choice + at].body()
                if body.logprobs is not None
                else None,
                "finish_reason": finishes[ask.first_choice + at],
            }
            for ask in asks
            for at, reader in enumerate(ask.readers)
        ]
        return {**envelope, "choices": choices, "usage": usage(asks)}

    async def _text_chunks(
        self, body: CompletionBody, asks: Sequence[Ask], envelope: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        base = envelope | ({"usage": None} if body.wants_usage else {})

        def chunk(
            choice: int, text: str, finish: str | None, marks: _TextMarks | None = None
        ) -> dict[str, Any]:
            return {
                **base,
                "choices": [
                    {
                        "index": choice,
                        "text": text,
                        "logprobs": marks.body() if marks else None,
                        "finish_reason": finish,
                    }
                ],
            }

        if body.echo:
            for ask in asks:
                for at in range(len(ask.readers)):
                    begun = await self._begin(body, ask.ticket.prompt, ask.broker)
                    yield chunk(
                        ask.first_choice + at,
                        self.service.tokenizer.decode(ask.ticket.prompt),
                        None,
                        begun if body.logprobs is not None else None,
                    )
        async with aclosing(self.service.spoken(asks)) as stream:
            async for spoken in stream:
                marks = None
                if spoken.said.tops is not None:
                    marks = _TextMarks()
                    marks.add(self.service.tokenizer, spoken.said.tops)
                if spoken.piece.answer or spoken.finish or marks:
                    yield chunk(spoken.choice, spoken.piece.answer, spoken.finish, marks)
        if body.wants_usage:
            yield {**base, "choices": [], "usage": usage(asks)}


class _TextMarks:
    """`logprobs` of a raw completion: four lists side by side."""

    def __init__(self) -> None:
        self.offset = 0
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add_first(self, tokenizer: Tokenizer, token: int) -> None:
        """A prompt's first token: nothing came before it, so nothing says how likely it was."""
        self._tokens.append(tokenizer.symbols[token])
        self._logprobs.append(None)
        self._tops.append(None)
        self._offsets.append(self.offset)
        self.offset += len(tokenizer.decode([token]))

    def add(self, tokenizer: Tokenizer, tops: list[tuple[int, float]]) -> None:
        (token, logprob), *best = tops
        self._tokens.append(tokenizer.symbols[token])
        self._logprobs.append(logprob)
        self._tops.append({tokenizer.symbols[other]: value for other, value in best})
        self._offsets.append(self.offset)
        self.offset += len(tokenizer.decode([token]))

    def body(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }
