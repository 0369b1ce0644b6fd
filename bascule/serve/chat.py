"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from bascule.serve.bodies import ChatBody, JsonFormat, SchemaFormat
from bascule.serve.errors import read
from bascule.serve.grammar import call_form
from bascule.serve.service import Ask, Service, Spoken, usage
from bascule.serve.text import Reader, chat_prompt


class ChatRoute:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def answer(self, request: Request) -> Response:
        body = await read(request, ChatBody)
        self.service.check_model(body.model)
        prompt = self.service.readable(lambda: chat_prompt(body.messages, self.service.tokenizer))
        ask = self.service.ask(
            body,
            prompt,
            body.limit,
            top=(body.top_logprobs or 0) if body.logprobs else None,
            split=True,
            form=_form(body),
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
            self._choice(body, at, reader, finish, marks[at])
            for at, (reader, finish) in enumerate(zip(ask.readers, finishes, strict=True))
        ]
        if body.stamp:
            for at, choice in enumerate(choices):
                choice["stamp"] = await self.service.stamp(ask, at, drawn=_form(body) is None)
        return {**envelope, "object": "chat.completion", "choices": choices, "usage": usage([ask])}

    def _choice(
        self,
        body: ChatBody,
        at: int,
        reader: Reader,
        finish: str | None,
        marks: list[dict[str, Any]],
    ) -> dict[str, Any]:
        call = _call(body, reader.answer)
        said = None if call or (reader.thought and not reader.answer) else reader.answer
        message = {
            "role": "assistant",
            "content": said,
            "refusal": None,
            **_thought(reader.thought),
        }
        return {
            "index": at,
            "message": message | ({"tool_calls": [call]} if call else {}),
            "logprobs": {"content": marks, "refusal": None} if body.logprobs else None,
            "finish_reason": "tool_calls" if call else finish,
        }

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
                answer = ask.readers[spoken.choice].answer
                # What may become a call is held back: a client must not see the same words as text and as a call.
                held = bool(body.callable_tools) and answer.startswith("{")
                call = _call(body, answer) if held and spoken.finish else None
                if call:
                    delta["tool_calls"] = [{"index": 0, **call}]
                elif held and spoken.finish:
                    delta["content"] = answer
                elif spoken.piece.answer and not held:
                    delta["content"] = spoken.piece.answer
                marks = self._chat_logprobs(spoken)
                if delta or marks:
                    yield chunk(spoken.choice, delta, marks=marks)
                if spoken.finish:
                    yield chunk(spoken.choice, {}, "tool_calls" if call else spoken.finish)
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
        return {
            "token": text,
            "logprob": max(logprob, -9999.0),
            "bytes": list(self.service.tokenizer.bytes_of(token)),
        }


def _form(body: ChatBody) -> dict[str, Any] | None:
    """The form that the answer must follow, if the client asked for one."""
    if body.callable_tools:
        tools = [tool.model_dump() for tool in body.callable_tools]
        return call_form(tools, free=body.tool_choice in (None, "auto"))
    if body.structured_outputs is not None:
        return body.structured_outputs.form
    if isinstance(body.response_format, SchemaFormat):
        return {"json": body.response_format.json_schema.schema_}
    return {"json": {"type": "object"}} if isinstance(body.response_format, JsonFormat) else None


def _call(body: ChatBody, answer: str) -> dict[str, Any] | None:
    """The tool call that an answer is, or None when it is plain text or was cut off."""
    if not body.callable_tools or not answer.startswith("{"):
        return None
    try:
        found = json.loads(answer)
    except json.JSONDecodeError:
        return None
    function = {"name": found["name"], "arguments": json.dumps(found["arguments"])}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _thought(text: str) -> dict[str, Any]:
    """Both spellings: vLLM's clients read the first, DeepSeek's and SGLang's the second."""
    return {"reasoning": text or None, "reasoning_content": text or None}
