"""What every kind of completion shares: hand a prompt to the engine, read what comes back, notice when nobody waits any more."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from bascule.data.tokenizer import Tokenizer
from bascule.errors import UsageError
from bascule.serve.bodies import Generation
from bascule.serve.broker import Broker
from bascule.serve.errors import ApiError
from bascule.serve.events import EventStream, as_lines, gone
from bascule.serve.grammar import compile_form
from bascule.serve.inflight import Refused, Said, Ticket
from bascule.serve.metrics import Metrics
from bascule.serve.text import Piece, Reader, left_open

STAMP_VERSION = 1
REFUSALS = {400: "form_failed", 500: "engine_crashed"}


@dataclass(frozen=True)
class Spoken:
    """One token of one choice, as text. `choice` counts over all prompts of the request."""

    choice: int
    said: Said
    piece: Piece
    finish: str | None


@dataclass(frozen=True)
class Ask:
    """One prompt of a request: its ticket, the broker that holds it (weights may be renewed meanwhile), a reader for each choice."""

    broker: Broker
    ticket: Ticket
    readers: list[Reader]
    first_choice: int


class Service:
    """The routes' shared state."""

    def __init__(
        self, broker: Broker, tokenizer: Tokenizer, *, model: str, timeout_s: float
    ) -> None:
        self.broker = broker
        self.tokenizer = tokenizer
        self.model = model
        self.metrics = Metrics(model)
        self.timeout_s = timeout_s
        self.draining = False

    def ask(
        self,
        body: Generation,
        prompt: list[int],
        limit: int | None,
        *,
        top: int | None,
        split: bool,
        form: dict[str, Any] | None = None,
        first_choice: int = 0,
    ) -> Ask:
        """Check the room, hand the prompt to the engine. Raises ApiError; a prompt that does not fit is never cut."""
        self._check_open()
        room = self.check_room(prompt, max(limit or 1, 1), "messages" if split else "prompt")
        try:
            sampling = body.sampling(
                max_tokens=room if limit is None else limit,
                seed=secrets.randbits(62),
                vocab_size=self.tokenizer.vocab_size,
            )
            bound = None
            if form:
                opened = split and left_open(prompt, self.tokenizer)
                bound = {"grammar": compile_form(form), "may_think": split, "thinking": opened}
            ticket = self.broker.submit(prompt, sampling, choices=body.choices, top=top, form=bound)
        except Refused as error:
            raise _refused(error) from None
        except (ValueError, UsageError) as error:
            raise ApiError(400, str(error), code="invalid_value") from None
        self.metrics.count("prompt_tokens_total", len(prompt))
        return Ask(
            self.broker,
            ticket,
            [Reader(self.tokenizer, prompt, body.stops, split=split) for _ in range(body.choices)],
            first_choice,
        )

    def check_room(self, prompt: Sequence[int], more: int, param: str) -> int:
        """Tokens of the context that a prompt leaves. Raises ApiError when it is empty or `more` do not fit."""
        if not prompt:
            raise ApiError(400, "The prompt holds no token.", param=param)
        room = self.context - len(prompt)
        if room < more:
            raise ApiError(
                400,
                f"This model's context holds {self.context} tokens; the prompt has {len(prompt)} and {more} more were asked for. "
                "Shorten the messages or ask for fewer tokens.",
                code="context_length_exceeded",
                param=param,
            )
        return room

    def check_count(self, count: int) -> None:
        """Raises ApiError for a request that would never fit, however long its client waits."""
        limit = self.broker.limit
        if count > limit:
            raise ApiError(
                400,
                f"{count} answers were asked for in one request; this server has room for {limit}, those of others included. Send several requests.",
                code="too_many_prompts",
                param="prompt",
            )

    def check_queue(self) -> None:
        """For a request that hands the engine no prompt to continue. Raises ApiError when it cannot be taken now."""
        self._check_open()
        try:
            self.broker.check_queue(1)
        except Refused as error:
            raise _refused(error) from None

    def _check_open(self) -> None:
        if self.draining:
            raise ApiError(
                503,
                "The server is shutting down and takes no new requests.",
                code="draining",
                retry_after_s=5,
            )

    def _late(self) -> ApiError:
        return ApiError(
            504, f"The answer was not finished within {self.timeout_s:g} s.", code="timeout"
        )

    async def score(
        self, prompt: list[int], top: int, broker: Broker | None = None
    ) -> list[list[tuple[int, float]]]:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await (broker or self.broker).score(prompt, top)
        except TimeoutError:
            raise self._late() from None
        except Refused as error:
            raise _refused(error) from None

    async def stamp(self, ask: Ask, choice: int, *, drawn: bool) -> dict[str, Any] | None:
        """What `bascule verify-answer` needs to check one choice elsewhere (infer/stamp.py). One more reading of the answer. None for
        an answer begun in another precision than it was finished in: no model wrote it whole."""
        ticket, about = ask.ticket, ask.broker.about
        if ticket.dtype != about["dtype"]:
            return None
        said = ticket.said[choice]
        try:
            marks = await ask.broker.marks(ticket.prompt, said)
        except Refused as error:
            raise _refused(error) from None
        return {
            "version": STAMP_VERSION,
            "weights_sha256": about["weights_sha256"],
            "dtype": about["dtype"],
            "chip": about["chip"],
            "accelerator": about["accelerator"],
            "simulated": about["simulated"],
            "verdict_id": ask.broker.candidate.verdict_id,
            "prompt": ticket.prompt,
            "said": said,
            "logprobs": ticket.logprobs[choice],
            "sampling": asdict(ticket.sampling),
            "choice": choice,
            "drawn": drawn,
            "marks": marks,
        }

    async def spoken(self, asks: Sequence[Ask]) -> AsyncGenerator[Spoken, None]:
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
                        raise _refused(arrival)
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
                        ask.broker.cancel(ask.ticket, arrival.choice)
                    yield Spoken(ask.first_choice + arrival.choice, arrival, piece, finish)
            self.metrics.observe("e2e_request_latency_seconds", time.monotonic() - start)
        except TimeoutError:
            raise self._late() from None
        finally:
            for relay in relays:
                relay.cancel()
            if left:
                self.metrics.count("request_success_total", len(left), finished_reason="abort")
            self.cancel(asks)

    def _observe(self, ask: Ask, said: Said, start: float, last: float, now: float) -> None:
        self.metrics.count("generation_tokens_total")
        if ask.readers[said.choice].tokens == 0:
            self.metrics.observe("time_to_first_token_seconds", now - start)
        else:
            self.metrics.observe("inter_token_latency_seconds", now - last)

    async def whole(
        self, request: Request, asks: Sequence[Ask], answer: Coroutine[Any, Any, dict[str, Any]]
    ) -> Response:
        """Wait for the answer, but not longer than the client does, nor than the server's limit."""
        working = asyncio.ensure_future(answer)
        leaving = asyncio.ensure_future(gone(request.receive))
        try:
            await asyncio.wait(
                {working, leaving}, return_when=asyncio.FIRST_COMPLETED, timeout=self.timeout_s
            )
            if not working.done():
                raise ClientDisconnect if leaving.done() else self._late()
            return JSONResponse(working.result())
        finally:
            working.cancel()
            leaving.cancel()
            self.cancel(asks)

    def stream(self, asks: Sequence[Ask], chunks: AsyncIterator[dict[str, Any]]) -> Response:
        return EventStream(as_lines(chunks), on_end=lambda: self.cancel(asks))

    def cancel(self, asks: Sequence[Ask]) -> None:
        for ask in asks:
            ask.broker.cancel(ask.ticket)

    @property
    def context(self) -> int:
        return int(self.broker.about["context"])

    @property
    def fingerprint(self) -> str:
        """Of the weights, the chip and its precision: an answer may change when this does."""
        about = self.broker.about
        rounded = "" if about["dtype"] == "float32" else f"-{about['dtype']}"
        return f"{about['weights_sha256'][:12]}@{about['accelerator']}{rounded}"

    def check_model(self, name: str) -> None:
        if name != self.model:
            raise ApiError(
                404,
                f"The model '{name}' does not exist; this server has '{self.model}'.",
                code="model_not_found",
                param="model",
            )

    def check_tokens(self, tokens: Sequence[int], param: str = "prompt") -> None:
        wrong = [token for token in tokens if not 0 <= token < self.tokenizer.vocab_size]
        if wrong:
            raise ApiError(
                400,
                f"Token {wrong[0]} does not exist; the vocabulary has {self.tokenizer.vocab_size} tokens.",
                code="invalid_value",
                param=param,
            )

    def tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.readable(lambda: self.tokenizer.encode(prompt))
        self.check_tokens(prompt)
        return prompt

    def readable(self, encode: Callable[[], list[int]]) -> list[int]:
        try:
            return encode()
        except UsageError as error:
            raise ApiError(400, str(error), code="unreadable_text", param="messages") from None


def _refused(error: Refused) -> ApiError:
    code = {429: "overloaded", **REFUSALS}.get(error.status, "no_chip")
    return ApiError(error.status, str(error), code=code, retry_after_s=error.retry_after_s)


async def _relay(ask: Ask, merged: asyncio.Queue[tuple[Ask, Said | Refused]]) -> None:
    while True:
        merged.put_nowait((ask, await ask.ticket.arrivals.get()))


def usage(asks: Sequence[Ask]) -> dict[str, Any]:
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
