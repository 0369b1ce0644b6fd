"""POST /v1/responses: the subset a stateless server can honour. Nothing is stored, so no `previous_response_id`, no GET."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from bascule.serve.bodies import WHOLE, Body, Generation, JsonFormat, Message, Part, TextFormat
from bascule.serve.errors import ApiError, read
from bascule.serve.events import EventStream
from bascule.serve.service import Ask, Service, Spoken, usage
from bascule.serve.text import Reader, chat_prompt


def _no_number(value: Any) -> Any:
    """0 equals False, and a Literal asks for no more."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError("Input should be false or null")
    return value


class InputPart(Part):
    type: Literal["text", "input_text", "output_text", "reasoning_text"]
    text: str


class InputItem(Body):
    """A message. Reasoning items that a client sends back are accepted and left out, as R1 asks."""

    type: Literal["message", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    summary: list[dict[str, Any]] | None = None
    encrypted_content: None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content if part.type != "reasoning_text")
        return self.content or ""


class FlatSchema(Body):
    """Here the schema lies beside its name, not inside `json_schema` as in chat completions."""

    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextSettings(Body):
    format: Annotated[TextFormat | JsonFormat | FlatSchema, Field(discriminator="type")] | None = (
        None
    )


class ResponsesBody(Body):
    model: str
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = False
    text: TextSettings | None = None
    store: Annotated[Literal[False] | None, BeforeValidator(_no_number)] = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    truncation: Literal["disabled"] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _something_to_answer(self) -> Self:
        if not self.messages:
            raise ValueError("input holds no message, only reasoning")
        return self

    @property
    def messages(self) -> list[Message]:
        items = (
            [InputItem(role="user", content=self.input)]
            if isinstance(self.input, str)
            else self.input
        )
        told = [Message(role="system", content=self.instructions)] if self.instructions else []
        return told + [
            Message(role=item.role or "user", content=item.text)
            for item in items
            if item.type == "message"
        ]

    @property
    def form(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text else None
        if isinstance(wanted, FlatSchema):
            return {"json": wanted.schema_}
        return {"json": {"type": "object"}} if isinstance(wanted, JsonFormat) else None


class ResponsesRoute:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def answer(self, request: Request) -> Response:
        body = await read(request, ResponsesBody)
        self.service.check_model(body.model)
        prompt = self.service.readable(lambda: chat_prompt(body.messages, self.service.tokenizer))
        settings = Generation(model=body.model, temperature=body.temperature, top_p=body.top_p)
        ask = self.service.ask(
            settings, prompt, body.max_output_tokens, top=None, split=True, form=body.form
        )
        envelope = self._envelope(body)
        if body.stream:
            events = _as_events(self._events(ask, envelope))
            return EventStream(events, on_end=lambda: self.service.cancel([ask]))
        return await self.service.whole(request, [ask], self._whole(ask, envelope))

    async def _whole(self, ask: Ask, envelope: dict[str, Any]) -> dict[str, Any]:
        finish = None
        async with aclosing(self.service.spoken([ask])) as stream:
            async for spoken in stream:
                finish = spoken.finish
        return _finished(envelope, ask, finish, _output(ask.readers[0], envelope["id"]))

    async def _events(
        self, ask: Ask, envelope: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        yield {"type": "response.created", "response": envelope}
        yield {"type": "response.in_progress", "response": envelope}
        finish = None
        open_item: _Item | None = None
        done: list[dict[str, Any]] = []
        async with aclosing(self.service.spoken([ask])) as stream:
            async for spoken in stream:
                finish = spoken.finish
                for kind, delta in _deltas(spoken):
                    if open_item is None or open_item.kind != kind:
                        if open_item is not None:
                            for event in open_item.close():
                                yield event
                            done.append(open_item.whole("completed"))
                        open_item = _Item(kind, len(done), envelope["id"])
                        for event in open_item.begin():
                            yield event
                    yield open_item.delta(delta)
        if open_item is not None:
            for event in open_item.close():
                yield event
            done.append(open_item.whole("completed"))
        final = _finished(envelope, ask, finish, done)
        yield {"type": f"response.{final['status']}", "response": final}

    def _envelope(self, body: ResponsesBody) -> dict[str, Any]:
        """Everything OpenAI's schema requires of a response, before anything was said."""
        return {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": self.service.model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {
                "format": body.text.format.model_dump(by_alias=True)
                if body.text and body.text.format
                else {"type": "text"}
            },
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
        }


Kind = Literal["reasoning", "message"]


class _Item:
    """One item of the output: a thought, or the message. `text` grows while it is streamed."""

    def __init__(self, kind: Kind, index: int, response: str, text: str = "") -> None:
        self.kind: Kind = kind
        self.index = index
        self.text = text
        self.id = (
            f"{'rs' if kind == 'reasoning' else 'msg'}_{index}_{response.removeprefix('resp_')}"
        )

    def whole(self, status: str) -> dict[str, Any]:
        item = {"id": self.id, "content": [self._part()], "status": status}
        if self.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": []}
        return {**item, "type": "message", "role": "assistant"}

    def begin(self) -> list[dict[str, Any]]:
        item = {**self.whole("in_progress"), "content": []}
        return [
            {"type": "response.output_item.added", "output_index": self.index, "item": item},
            {"type": "response.content_part.added", **self._where, "part": self._part()},
        ]

    def delta(self, text: str) -> dict[str, Any]:
        self.text += text
        return {
            "type": f"response.{self._text_kind}.delta",
            **self._where,
            "delta": text,
            **self._no_logprobs,
        }

    def close(self) -> list[dict[str, Any]]:
        return [
            {
                "type": f"response.{self._text_kind}.done",
                **self._where,
                "text": self.text,
                **self._no_logprobs,
            },
            {"type": "response.content_part.done", **self._where, "part": self._part()},
            {
                "type": "response.output_item.done",
                "output_index": self.index,
                "item": self.whole("completed"),
            },
        ]

    @property
    def _where(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}

    @property
    def _text_kind(self) -> str:
        return "reasoning_text" if self.kind == "reasoning" else "output_text"

    @property
    def _no_logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self.kind == "message" else {}

    def _part(self) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}


def _deltas(spoken: Spoken) -> list[tuple[Kind, str]]:
    found: list[tuple[Kind, str]] = []
    if spoken.piece.thought:
        found.append(("reasoning", spoken.piece.thought))
    if spoken.piece.answer:
        found.append(("message", spoken.piece.answer))
    return found


def _output(reader: Reader, response: str) -> list[dict[str, Any]]:
    texts: list[tuple[Kind, str]] = [("reasoning", reader.thought)] if reader.thought else []
    if reader.answer or not texts:
        texts.append(("message", reader.answer))
    return [
        _Item(kind, at, response, text).whole("completed") for at, (kind, text) in enumerate(texts)
    ]


def _finished(
    envelope: dict[str, Any], ask: Ask, finish: str | None, output: list[dict[str, Any]]
) -> dict[str, Any]:
    counts = usage([ask])
    whole = finish != "length"
    return {
        **envelope,
        "status": "completed" if whole else "incomplete",
        "incomplete_details": None if whole else {"reason": "max_output_tokens"},
        "output": output,
        "usage": {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": counts["completion_tokens_details"],
            "total_tokens": counts["total_tokens"],
        },
    }


async def _as_events(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    number = 0
    try:
        async for event in events:
            yield _event({**event, "sequence_number": number})
            number += 1
    except ApiError as error:
        told = {name: error.body["error"][name] for name in ("code", "message", "param")}
        yield _event({"type": "error", **told, "sequence_number": number})


def _event(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n"
