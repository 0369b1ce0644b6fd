"""The routes. Those that make the model speak live in chat.py and completions.py; the rest is here.

Facts a client may rely on: a prompt is never cut (400 instead); `reasoning` and `reasoning_content` carry the thought, `content`
only the answer; the pieces of a stream joined together are what the plain answer holds; same `seed`, same answer.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from bascule.errors import CheckFailed, DeviceFault, UsageError
from bascule.serve.bodies import DetokenizeBody, TokenizeBody, WeightsBody
from bascule.serve.chat import ChatRoute
from bascule.serve.completions import CompletionRoute
from bascule.serve.document import document
from bascule.serve.errors import (
    ApiError,
    answer_crash,
    answer_error,
    answer_http,
    answer_nobody,
    read,
)
from bascule.serve.responses import ResponsesRoute
from bascule.serve.service import Service
from bascule.serve.text import chat_prompt

CREATED = int(time.time())
Renew = Callable[[str | None, str | None], Awaitable[dict[str, Any]]]
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


class Routes:
    """`about()` tells which chip answers and what its verdict is."""

    def __init__(
        self,
        service: Service,
        *,
        about: Callable[[], dict[str, Any]],
        page: str,
        renew: Renew | None = None,
    ) -> None:
        self.service = service
        self.about = about
        self.page = page
        self.renew = renew

    async def health(self, request: Request) -> Response:
        """200 while a chip answers or a move is under way (requests wait for it); 503 when none is left."""
        state = self.service.broker.state
        body = {
            "status": state,
            "chip": self.service.broker.about.get("chip"),
            "pool": self.service.broker.candidate.pool,
            "trouble": self.service.broker.trouble or None,
        }
        return JSONResponse(body, status_code=503 if state in ("down", "closed") else 200)

    async def ready(self, request: Request) -> Response:
        """200 only when a request would be worked on at once."""
        fine = self.service.broker.state == "serving" and not self.service.draining
        return JSONResponse(
            {
                "ready": fine,
                "status": "draining" if self.service.draining else self.service.broker.state,
            },
            status_code=200 if fine else 503,
        )

    async def version(self, request: Request) -> Response:
        return JSONResponse(self.about())

    async def weights(self, request: Request) -> Response:
        """Serve other weights from now on. From this machine and with the key only: the body names a folder of this machine."""
        local = request.client is not None and request.client.host in ("127.0.0.1", "::1")
        if self.renew is None or not local:
            raise ApiError(
                403,
                "New weights are taken from this machine only, and only by a server that asks for a key (--api-key-file). "
                "Or send SIGHUP: the run's own model is read again.",
                code="forbidden",
            )
        body = await read(request, WeightsBody)
        try:
            done = await self.renew(body.folder, body.sha256)
        except (UsageError, CheckFailed) as error:
            raise ApiError(409, str(error), code="weights_refused") from None
        except DeviceFault as error:
            raise ApiError(503, str(error), code="no_chip") from None
        return JSONResponse(done)

    async def show_document(self, request: Request) -> Response:
        return JSONResponse(document(self.service.model, self.service.tokenizer.vocab_size))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def one_model(self, request: Request) -> Response:
        self.service.check_model(request.path_params["model"])
        return JSONResponse(self._model_object())

    async def show_metrics(self, request: Request) -> Response:
        load = self.service.broker.load
        gauges = {
            "num_requests_running": load.get("running", 0),
            "num_requests_waiting": load.get("waiting", 0),
            "kv_cache_usage_perc": load.get("cache_used_ratio", 0.0),
            "engine_up": float(self.service.broker.state == "serving"),
        }
        counters = {
            "prefix_cache_queries_total": load.get("prefix_queries", 0),
            "prefix_cache_hits_total": load.get("prefix_hits", 0),
            "num_preemptions_total": load.get("preemptions", 0),
            "spec_decode_num_draft_tokens_total": load.get("guessed", 0),
            "spec_decode_num_accepted_tokens_total": load.get("guesses_kept", 0),
            "audits_total": self.service.broker.audits.done,
            "engine_moves_total": self.service.broker.moves,
        }
        return PlainTextResponse(
            self.service.metrics.render(gauges, counters), media_type="text/plain; version=0.0.4"
        )

    async def tokenize(self, request: Request) -> Response:
        body = await read(request, TokenizeBody)
        self.service.check_model(body.model or self.service.model)
        if body.messages is not None:
            tokens = self.service.readable(
                lambda: chat_prompt(
                    body.messages or [],
                    self.service.tokenizer,
                    add_generation_prompt=body.add_generation_prompt,
                )
            )
        else:
            tokens = self.service.readable(lambda: self.service.tokenizer.encode(body.prompt or ""))
        return JSONResponse(
            {"tokens": tokens, "count": len(tokens), "max_model_len": self.service.context}
        )

    async def detokenize(self, request: Request) -> Response:
        body = await read(request, DetokenizeBody)
        self.service.check_model(body.model or self.service.model)
        self.service.check_tokens(body.tokens, "tokens")
        return JSONResponse({"prompt": self.service.tokenizer.decode(body.tokens)})

    async def embeddings(self, request: Request) -> Response:
        raise ApiError(
            400,
            f"'{self.service.model}' writes answers and has no embeddings. Use a model made for them.",
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

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self.service.model,
            "object": "model",
            "created": CREATED,
            "owned_by": "bascule",
            "max_model_len": self.service.context,
        }


def application(
    service: Service,
    *,
    about: Callable[[], dict[str, Any]],
    page: str,
    renew: Renew | None = None,
) -> Starlette:
    """`renew(folder, sha256)` takes new weights; None where nobody may ask for that."""
    api = Routes(service, about=about, page=page, renew=renew)
    routes = [
        Route("/", api.show_page),
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/version", api.version),
        Route("/openapi.json", api.show_document),
        Route("/metrics", api.show_metrics),
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.one_model),
        Route("/v1/chat/completions", ChatRoute(service).answer, methods=["POST"]),
        Route("/v1/completions", CompletionRoute(service).answer, methods=["POST"]),
        Route("/v1/responses", ResponsesRoute(service).answer, methods=["POST"]),
        Route("/v1/embeddings", api.embeddings, methods=["POST"]),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/admin/weights", api.weights, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        exception_handlers={
            ApiError: answer_error,
            HTTPException: answer_http,
            ClientDisconnect: answer_nobody,
            Exception: answer_crash,
        },
    )
