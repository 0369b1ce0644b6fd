"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from bascule.serve.bodies import ChatBody
from bascule.serve.errors import ApiError, read
from bascule.serve.service import Ask, Service, Spoken, usage
from bascule.serve.text import chat_prompt


class ChatRoute:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def answer(self, request: Request) -> Response:
        body = await read(request, ChatBody)
        self.service.check_model(body.model)
        _refuse_unsupported(body)
        prompt = self.service.readable(lambda: chat_prompt(body.messages, self.service.tokenizer))
        ask = self.service.ask(
            body,
            prompt,
            body.limit,
            top=(body.top_logprobs or 0) if body.logprobs else None,
            split=True,
        )
        envelope = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.service.model,
            "system_fingerprint": self.service.fingerprint,
        }
        if body.stream:
            return self.service.stream([ask], self._chat_chunks(body, ask, envelope))
        return await self.service.whole(request, [ask], self._chat_answer(body, ask, envelope))

    async def _chat_answer(
        self, body: ChatBody, ask: Ask, envelope: dict[str, Any]
    ) -> dict[str, Any]:
        marks: list[list[dict[str, Any]]] = [[] for _ in ask.readers]
        finishes: list[str | None] = [None] * len(ask.readers)
        async with aclosing(self.service.spoken([ask])) as stream:
            async for spoken in stream:
                marks[spoken.choice] += self._chat_logprobs(spoken)
                finishes[spoken.choice] = spoken.finish or finishes[spoken.choice]
        choices = [
            {
                "index": at,
                "message": {
                    "role": "assistant",
                    "content": reader.answer or None if reader.thought else reader.answer,
                    "refusal": None,
                    **_thought(reader.thought),
                },
                "logprobs": {"content": marks[at], "refusal": None} if body.logprobs else None,
                "finish_reason": finishes[at],
            }
            for at, reader in enumerate(ask.readers)
        ]
        return {**envelope, "object": "chat.completion", "choices": choices, "usage": usage([ask])}

    async def _chat_chunks(
        self, body: ChatBody, ask: Ask, envelope: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        base = {**envelope, "object": "chat.completion.chunk"} | (
            {"usage": None} if body.wants_usage else {}
        )

        def chunk(
            choice: int,
            delta: dict[str, Any],
            finish: str | None = None,
            marks: list[dict[str, Any]] | None = None,
        ) -> dict[str, Any]:
            logprobs = {"content": marks, "refusal": None} if marks else None
            return {
                **base,
                "choices": [
                    {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
                ],
            }

        for choice in range(len(ask.readers)):
            yield chunk(choice, {"role": "assistant", "content": ""})
        async with aclosing(self.service.spoken([ask])) as stream:
            async for spoken in stream:
                delta = _thought(spoken.piece.thought) if spoken.piece.thought else {}
                if spoken.piece.answer:
                    delta["content"] = spoken.piece.answer
                marks = self._chat_logprobs(spoken)
                if delta or marks:
                    yield chunk(spoken.choice, delta, marks=marks)
                if spoken.finish:
                    yield chunk(spoken.choice, {}, spoken.finish)
        if body.wants_usage:
            yield {**base, "choices": [], "usage": usage([ask])}

    def _chat_logprobs(self, spoken: Spoken) -> list[dict[str, Any]]:
        """The token's own entry under the model's distribution at T=1; the end token has no text and no entry."""
        if spoken.said.tops is None or spoken.said.token == self.service.tokenizer.eos_id:
            return []
        entries = [self._mark(token, logprob) for token, logprob in spoken.said.tops]
        return [{**entries[0], "top_logprobs": entries[1:]}]

    def _mark(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.service.tokenizer.symbols[token]
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def _refuse_unsupported(body: ChatBody) -> None:
    if body.tools and body.tool_choice != "none":
        raise ApiError(
            400,
            "tools: this model was not trained to call tools. Leave the field out.",
            code="unsupported",
            param="tools",
        )
    if body.response_format is not None and body.response_format.get("type") != "text":
        raise ApiError(
            400,
            "response_format: only {'type': 'text'} is supported.",
            code="unsupported",
            param="response_format",
        )


def _thought(text: str) -> dict[str, Any]:
    """Both spellings: vLLM's clients read the first, DeepSeek's and SGLang's the second."""
    return {"reasoning": text or None, "reasoning_content": text or None}
