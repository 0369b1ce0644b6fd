"""What every request passes before a route sees it: who may enter, from where, with how much. Plain ASGI.

A server on 127.0.0.1 is reachable from any page the user's browser shows. So the Host header must name this machine (DNS
rebinding), and a POST must say application/json, which a foreign page cannot send without asking first (we never agree: no CORS).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/favicon.ico"})
READ_PATHS = OPEN_PATHS | {
    "/metrics",
    "/openapi.json",
    "/v1/models",
}  # a POST to them is a 405 of the routes, whatever it carries
DRAIN_BYTES = 16 << 20
DRAIN_S = 2.0
LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


def error_body(
    message: str, kind: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Door:
    """`api_key` None lets everybody in; `local_only` checks the Host header."""

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, local_only: bool, body_limit_bytes: int
    ) -> None:
        self._app = app
        self._api_key = api_key.encode() if api_key else None
        self._local_only = local_only
        self._limit = body_limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            if scope["method"] == "POST":
                await _drain(receive)
            await _refuse(send, *refusal)
            return
        await self._app(scope, *self._limited(receive, send))

    def _refusal(
        self, scope: Scope, headers: dict[str, bytes]
    ) -> tuple[int, dict[str, Any]] | None:
        host = headers.get("host", b"").decode("latin-1")
        name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self._local_only and name not in LOCAL_NAMES:
            return 403, error_body(
                f"This server answers to 127.0.0.1 and localhost, not to '{host}'.",
                "permission_error",
                code="bad_host",
            )
        if scope["path"] not in OPEN_PATHS and not self._knows(headers.get("authorization", b"")):
            return 401, error_body(
                "A valid API key is needed: 'Authorization: Bearer KEY'.",
                "authentication_error",
                code="invalid_api_key",
            )
        if scope["method"] == "POST" and scope["path"] not in READ_PATHS:
            kind = headers.get("content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                return 415, error_body(
                    "The body must be application/json.",
                    "invalid_request_error",
                    code="unsupported_media_type",
                )
            length = headers.get("content-length", b"0")
            if not length.isdigit() or int(length) > self._limit:
                return 413, self._too_large()
        return None

    def _knows(self, authorization: bytes) -> bool:
        """Compared in constant time: how long a refusal takes tells nothing about the key."""
        if self._api_key is None:
            return True
        scheme, _, key = authorization.partition(b" ")
        return hmac.compare_digest(key.strip(), self._api_key) and scheme.lower() == b"bearer"

    def _too_large(self) -> dict[str, Any]:
        return error_body(
            f"The body is larger than {self._limit} bytes.",
            "invalid_request_error",
            code="body_too_large",
        )

    def _limited(self, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """A body without a length is counted as it comes. Over the limit the client gets 413 and the route an early end."""
        taken = 0
        refused = False

        async def limited_receive() -> Message:
            nonlocal taken, refused
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limit and not refused:
                refused = True
                if message.get("more_body"):
                    await _drain(receive)
                await _refuse(send, 413, self._too_large())
                return {"type": "http.disconnect"}
            return message

        async def limited_send(message: Message) -> None:
            if not refused:
                await send(message)

        return limited_receive, limited_send


async def _drain(receive: Receive) -> None:
    """Read the rest of a body that will be refused, within reason: closing on unread data resets the connection, and the
    client would never see why."""
    taken = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while taken < DRAIN_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


async def _refuse(
    send: Callable[[Message], Awaitable[None]], status: int, body: dict[str, Any]
) -> None:
    data = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
