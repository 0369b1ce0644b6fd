"""Answers that come piece by piece, and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bascule.serve.errors import ApiError


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
        leaving = asyncio.ensure_future(gone(receive))
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


async def as_lines(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """An error after the first byte can only be told inside the stream; it then ends without `[DONE]`."""
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body, separators=(',', ':'))}\n\n"


async def gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
