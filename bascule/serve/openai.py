"""OpenAI's API over a broker: routes, the shapes of answers and of streams, and errors in OpenAI's words.

Facts a client may rely on: a prompt is never cut (400 instead); `reasoning` and `reasoning_content` carry the thought, `content`
only the answer; the pieces of a stream joined together are what the plain answer holds; same `seed`, same answer.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from bascule.data.tokenizer import Tokenizer
from bascule.errors import UsageError
from bascule.serve.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Generation,
    TokenizeBody,
)
from bascule.serve.broker import Broker, Refused, Said, Ticket
from bascule.serve.door import error_body
from bascule.serve.metrics import Metrics
from bascule.serve.text import Piece, Reader, chat_prompt

AnyBody = TypeVar("AnyBody", bound=Body)
CREATED = int(time.time())


class ApiError(Exception):
    """Becomes a response in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"Retry-After": str(retry_after_s)} if retry_after_s is not None else None
        self.body = error_body(
            message, KINDS.get(status, "invalid_request_error"), code=code, param=param
        )


KINDS = {
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


@dataclass(frozen=True)
class Spoken:
    """One token of one choice, as text. `choice` counts over all prompts of the request."""

    choice: int
    said: Said
    piece: Piece
    finish: str | None


@dataclass(frozen=True)
class Ask:
    """One prompt of a request: its ticket and a reader for each choice."""

    ticket: Ticket
    readers: list[Reader]
    first_choice: int


class Api:
    """The routes' shared state. `about()` tells which chip answers and what its verdict is."""

    def __init__(
        self,
        broker: Broker,
        tokenizer: Tokenizer,
        *,
        model: str,
        about: Callable[[], dict[str, Any]],
        page: str,
        timeout_s: float = 600.0,
    ) -> None:
        self.broker = broker
        self.tokenizer = tokenizer
        self.model = model
        self.metrics = Metrics(model)
        self.about = about
        self.page = page
        self.timeout_s = timeout_s
        self.draining = False

    # ---- small routes

    async def health(self, request: Request) -> Response:
        """200 while a chip answers or a move is under way (requests wait for it); 503 when none is left."""
        state = self.broker.state
        body = {
            "status": state,
            "chip": self.broker.about.get("chip"),
            "pool": self.broker.candidate.pool,
            "trouble": self.broker.trouble or None,
        }
        return JSONResponse(body, status_code=503 if state in ("down", "closed") else 200)

    async def ready(self, request: Request) -> Response:
        """200 only when a request would be worked on at once."""
        fine = self.broker.state == "serving" and not self.draining
        return JSONResponse(
            {"ready": fine, "status": "draining" if self.draining else self.broker.state},
            status_code=200 if fine else 503,
        )

    async def version(self, request: Request) -> Response:
        return JSONResponse(self.about())

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model_object())

    async def show_metrics(self, request: Request) -> Response:
        load = self.broker.load
        gauges = {
            "num_requests_running": load.get("running", 0),
            "num_requests_waiting": load.get("waiting", 0),
            "kv_cache_usage_perc": load.get("cache_used_ratio", 0.0),
            "engine_up": float(self.broker.state == "serving"),
        }
        counters = {
            "prefix_cache_queries_total": load.get("prefix_queries", 0),
            "prefix_cache_hits_total": load.get("prefix_hits", 0),
            "engine_moves_total": self.broker.moves,
        }
        return PlainTextResponse(
            self.metrics.render(gauges, counters), media_type="text/plain; version=0.0.4"
        )

    async def tokenize(self, request: Request) -> Response:
        body = await _read(request, TokenizeBody)
        if body.messages is not None:
            tokens = self._readable(
                lambda: chat_prompt(
                    body.messages or [],
                    self.tokenizer,
                    add_generation_prompt=body.add_generation_prompt,
                )
            )
        else:
            tokens = self._readable(lambda: self.tokenizer.encode(body.prompt or ""))
        return JSONResponse(
            {"tokens": tokens, "count": len(tokens), "max_model_len": self._context}
        )

    async def detokenize(self, request: Request) -> Response:
        body = await _read(request, DetokenizeBody)
        self._check_tokens(body.tokens)
        return JSONResponse({"prompt": self.tokenizer.decode(body.tokens)})

    async def embeddings(self, request: Request) -> Response:
        raise ApiError(
            400,
            f"'{self.model}' writes answers and has no embeddings. Use a model made for them.",
            code="unsupported",
        )

    async def show_page(self, request: Request) -> Response:
        return HTMLResponse(
            self.page,
            headers={
                "Content-Security-Policy": PAGE_POLICY,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
            },
        )

    # ---- chat

    async def chat(self, request: Request) -> Response:
        body = await _read(request, ChatBody)
        self._check_model(body.model)
        _refuse_unsupported(body)
        prompt = self._readable(lambda: chat_prompt(body.messages, self.tokenizer))
        ask = self._ask(
            body,
            prompt,
            body.limit,
            top=(body.top_logprobs or 0) if body.logprobs else None,
            split=True,
        )
        envelope = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": self._fingerprint,
        }
        if body.stream:
            return self._stream([ask], self._chat_chunks(body, ask, envelope))
        return await self._whole(request, [ask], self._chat_answer(body, ask, envelope))

    async def _chat_answer(
        self, body: ChatBody, ask: Ask, envelope: dict[str, Any]
    ) -> dict[str, Any]:
        marks: list[list[dict[str, Any]]] = [[] for _ in ask.readers]
        finishes: list[str | None] = [None] * len(ask.readers)
        async with aclosing(self._spoken([ask])) as stream:
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
        return {**envelope, "object": "chat.completion", "choices": choices, "usage": _usage([ask])}

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
        async with aclosing(self._spoken([ask])) as stream:
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
            yield {**base, "choices": [], "usage": _usage([ask])}

    def _chat_logprobs(self, spoken: Spoken) -> list[dict[str, Any]]:
        """The token's own entry under the model's distribution at T=1; the end token has no text and no entry."""
        if spoken.said.tops is None or spoken.said.token == self.tokenizer.eos_id:
            return []
        entries = [self._mark(token, logprob) for token, logprob in spoken.said.tops]
        return [{**entries[0], "top_logprobs": entries[1:]}]

    def _mark(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.symbols[token]
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    # ---- raw completions

    async def completions(self, request: Request) -> Response:
        body = await _read(request, CompletionBody)
        self._check_model(body.model)
        if not body.prompts:
            raise ApiError(400, "The list of prompts is empty.", param="prompt")
        asks: list[Ask] = []
        try:
            for prompt in body.prompts:
                tokens = self._tokens(prompt)
                limit = 16 if body.max_tokens is None else body.max_tokens
                asks.append(
                    self._ask(
                        body,
                        tokens,
                        limit,
                        top=body.logprobs,
                        split=False,
                        first_choice=len(asks) * body.choices,
                    )
                )
        except ApiError:
            self._cancel(asks)
            raise
        envelope = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": self._fingerprint,
        }
        if body.stream:
            return self._stream(asks, self._text_chunks(body, asks, envelope))
        return await self._whole(request, asks, self._text_answer(body, asks, envelope))

    async def _text_answer(
        self, body: CompletionBody, asks: Sequence[Ask], envelope: dict[str, Any]
    ) -> dict[str, Any]:
        total = sum(len(ask.readers) for ask in asks)
        marks = [_TextMarks() for _ in range(total)]
        finishes: list[str | None] = [None] * total
        for ask in asks:
            for at in range(len(ask.readers)):
                if body.echo:
                    marks[ask.first_choice + at].offset = len(
                        self.tokenizer.decode(ask.ticket.prompt)
                    )
        async with aclosing(self._spoken(asks)) as stream:
            async for spoken in stream:
                if spoken.said.tops is not None:
                    marks[spoken.choice].add(self.tokenizer, spoken.said.tops)
                finishes[spoken.choice] = spoken.finish or finishes[spoken.choice]
        choices = [
            {
                "index": ask.first_choice + at,
                "text": (self.tokenizer.decode(ask.ticket.prompt) if body.echo else "")
                + reader.answer,
                "logprobs": marks[ask.first_choice + at].body()
                if body.logprobs is not None
                else None,
                "finish_reason": finishes[ask.first_choice + at],
            }
            for ask in asks
            for at, reader in enumerate(ask.readers)
        ]
        return {**envelope, "choices": choices, "usage": _usage(asks)}

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
                    yield chunk(
                        ask.first_choice + at, self.tokenizer.decode(ask.ticket.prompt), None
                    )
        async with aclosing(self._spoken(asks)) as stream:
            async for spoken in stream:
                marks = None
                if spoken.said.tops is not None:
                    marks = _TextMarks()
                    marks.add(self.tokenizer, spoken.said.tops)
                if spoken.piece.answer or spoken.finish or marks:
                    yield chunk(spoken.choice, spoken.piece.answer, spoken.finish, marks)
        if body.wants_usage:
            yield {**base, "choices": [], "usage": _usage(asks)}

    # ---- what both share

    def _ask(
        self,
        body: Generation,
        prompt: list[int],
        limit: int | None,
        *,
        top: int | None,
        split: bool,
        first_choice: int = 0,
    ) -> Ask:
        """Check the room, hand the prompt to the engine. Raises ApiError; a prompt that does not fit is never cut."""
        if self.draining:
            raise ApiError(
                503,
                "The server is shutting down and takes no new requests.",
                code="draining",
                retry_after_s=5,
            )
        room = self._context - len(prompt)
        if room < max(limit or 1, 1):
            raise ApiError(
                400,
                f"This model's context holds {self._context} tokens; the prompt has {len(prompt)} and {limit or 1} more were asked for. "
                "Shorten the messages or ask for fewer tokens.",
                code="context_length_exceeded",
                param="messages" if split else "prompt",
            )
        if not prompt:
            raise ApiError(400, "The prompt holds no token.", param="prompt")
        try:
            sampling = body.sampling(
                max_tokens=room if limit is None else limit,
                seed=secrets.randbits(62),
                vocab_size=self.tokenizer.vocab_size,
            )
            ticket = self.broker.submit(prompt, sampling, choices=body.choices, top=top)
        except Refused as error:
            raise ApiError(
                error.status,
                str(error),
                code="overloaded" if error.status == 429 else "no_chip",
                retry_after_s=error.retry_after_s,
            ) from None
        except (ValueError, UsageError) as error:
            raise ApiError(400, str(error), code="invalid_value") from None
        self.metrics.count("prompt_tokens_total", len(prompt))
        return Ask(
            ticket,
            [Reader(self.tokenizer, prompt, body.stops, split=split) for _ in range(body.choices)],
            first_choice,
        )

    async def _spoken(self, asks: Sequence[Ask]) -> AsyncGenerator[Spoken, None]:
        """Tokens of all asks as they come. Leaving early, for whatever reason, cancels what is unfinished."""
        merged: asyncio.Queue[tuple[Ask, Said | Refused]] = asyncio.Queue()
        relays = [asyncio.create_task(_relay(ask, merged)) for ask in asks] if len(asks) > 1 else []
        left = {(id(ask), choice) for ask in asks for choice in range(len(ask.readers))}
        start = last = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout_s):
                while left:
                    ask, arrival = (
                        (asks[0], await asks[0].ticket.arrivals.get())
                        if not relays
                        else await merged.get()
                    )
                    if isinstance(arrival, Refused):
                        raise ApiError(arrival.status, str(arrival), code="no_chip")
                    if (id(ask), arrival.choice) not in left:
                        continue
                    now = time.monotonic()
                    self._observe(ask, arrival, start, last, now)
                    last = now
                    piece = ask.readers[arrival.choice].feed(
                        arrival.token, last=arrival.finish is not None
                    )
                    finish = "stop" if piece.stopped else arrival.finish
                    if finish:
                        left.discard((id(ask), arrival.choice))
                        self.metrics.count("request_success_total", finished_reason=finish)
                    if piece.stopped:
                        self.broker.cancel(ask.ticket, arrival.choice)
                    yield Spoken(ask.first_choice + arrival.choice, arrival, piece, finish)
            self.metrics.observe("e2e_request_latency_seconds", time.monotonic() - start)
        except TimeoutError:
            raise ApiError(
                504, f"The answer was not finished within {self.timeout_s:g} s.", code="timeout"
            ) from None
        finally:
            for relay in relays:
                relay.cancel()
            if left:
                self.metrics.count("request_success_total", len(left), finished_reason="abort")
            self._cancel(asks)

    def _observe(self, ask: Ask, said: Said, start: float, last: float, now: float) -> None:
        self.metrics.count("generation_tokens_total")
        if ask.readers[said.choice].tokens == 0:
            self.metrics.observe("time_to_first_token_seconds", now - start)
        else:
            self.metrics.observe("inter_token_latency_seconds", now - last)

    async def _whole(
        self, request: Request, asks: Sequence[Ask], answer: Coroutine[Any, Any, dict[str, Any]]
    ) -> Response:
        """Wait for the answer, but not longer than the client does."""
        working = asyncio.ensure_future(answer)
        leaving = asyncio.ensure_future(_gone(request.receive))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientDisconnect
            return JSONResponse(working.result())
        finally:
            working.cancel()
            leaving.cancel()
            self._cancel(asks)

    def _stream(self, asks: Sequence[Ask], chunks: AsyncIterator[dict[str, Any]]) -> Response:
        return EventStream(_lines(chunks), on_end=lambda: self._cancel(asks))

    def _cancel(self, asks: Sequence[Ask]) -> None:
        for ask in asks:
            self.broker.cancel(ask.ticket)

    @property
    def _context(self) -> int:
        return int(self.broker.about["context"])

    @property
    def _fingerprint(self) -> str:
        """Of the weights and the chip: an answer may change when this does."""
        return f"{self.broker.about['weights_sha256'][:12]}@{self.broker.about['accelerator']}"

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": CREATED,
            "owned_by": "bascule",
            "max_model_len": self._context,
        }

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise ApiError(
                404,
                f"The model '{name}' does not exist; this server has '{self.model}'.",
                code="model_not_found",
                param="model",
            )

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        wrong = [token for token in tokens if not 0 <= token < self.tokenizer.vocab_size]
        if wrong:
            raise ApiError(
                400,
                f"Token {wrong[0]} does not exist; the vocabulary has {self.tokenizer.vocab_size} tokens.",
                code="invalid_value",
                param="prompt",
            )

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._readable(lambda: self.tokenizer.encode(prompt))
        self._check_tokens(prompt)
        return prompt

    def _readable(self, encode: Callable[[], list[int]]) -> list[int]:
        try:
            return encode()
        except UsageError as error:
            raise ApiError(400, str(error), code="unreadable_text", param="messages") from None


class _TextMarks:
    """`logprobs` of a raw completion: four lists side by side."""

    def __init__(self) -> None:
        self.offset = 0
        self._tokens: list[str] = []
        self._logprobs: list[float] = []
        self._tops: list[dict[str, float]] = []
        self._offsets: list[int] = []

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


class EventStream(Response):
    """Server-sent events. Whoever ends it, the reader or the writer, `on_end` runs."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[str], *, on_end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._lines = lines
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            writing.cancel()
            leaving.cancel()
            self._on_end()

    async def _write(self, send: Send) -> None:
        async for line in self._lines:
            await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _lines(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """An error after the first byte can only be told inside the stream; it then ends without `[DONE]`."""
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body, separators=(',', ':'))}\n\n"


async def _relay(ask: Ask, merged: asyncio.Queue[tuple[Ask, Said | Refused]]) -> None:
    while True:
        merged.put_nowait((ask, await ask.ticket.arrivals.get()))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, kind: type[AnyBody]) -> AnyBody:
    """The body, checked. Raises ApiError that names the field."""
    data = await request.body()
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(
            400,
            f"{where}: {message}" if where else message,
            code=first["type"],
            param=where or None,
        ) from None


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


def _usage(asks: Sequence[Ask]) -> dict[str, Any]:
    prompt = sum(len(ask.ticket.prompt) for ask in asks)
    readers = [reader for ask in asks for reader in ask.readers]
    said = sum(reader.tokens for reader in readers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": sum(ask.ticket.cached_tokens for ask in asks)},
        "completion_tokens_details": {
            "reasoning_tokens": sum(reader.thought_tokens for reader in readers)
        },
    }


PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"


def application(api: Api) -> Starlette:
    routes = [
        Route("/", api.show_page),
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/version", api.version),
        Route("/metrics", api.show_metrics),
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.one_model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/embeddings", api.embeddings, methods=["POST"]),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        exception_handlers={
            ApiError: _answer_error,
            HTTPException: _answer_http,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_crash,
        },
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {
        404: f"There is nothing at {request.method} {request.url.path}.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    body = error_body(
        words.get(error.status_code, str(error.detail)),
        "not_found_error" if error.status_code == 404 else "invalid_request_error",
    )
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _answer_crash(request: Request, error: Exception) -> Response:
    """Starlette has logged it with its traceback; the client learns that it is our fault, not what is inside."""
    return JSONResponse(
        error_body("The server failed on this request; its log says why.", "server_error"),
        status_code=500,
    )
