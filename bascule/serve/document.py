"""The API's OpenAPI document, made from the bodies that the routes check: what is described is what is enforced."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from pydantic.json_schema import models_json_schema

from bascule.serve.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    WeightsBody,
)
from bascule.serve.responses import ResponsesBody

BODIES: Mapping[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/admin/weights": WeightsBody,
}
READS = ("/v1/models", "/health", "/ready", "/version")
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(model: str, vocab_size: int) -> dict[str, Any]:
    """OpenAPI 3.1 of the server that has `model`, whose token ids are below `vocab_size`. Refusals a client can cause carry the error's shape."""
    names, schemas = models_json_schema(
        [(body, "validation") for body in BODIES.values()],
        ref_template="#/components/schemas/{model}",
    )
    for body in BODIES.values():
        properties = schemas["$defs"][body.__name__]["properties"]
        if "model" in properties:
            named = "model" in schemas["$defs"][body.__name__].get("required", ())
            properties["model"] = (
                {"type": "string", "enum": [model]} if named else {"enum": [model, None]}
            )
    _bound_ids(schemas["$defs"]["DetokenizeBody"]["properties"]["tokens"], vocab_size)
    for one in schemas["$defs"]["CompletionBody"]["properties"]["prompt"]["anyOf"]:
        _bound_ids(one, vocab_size)
    paths: dict[str, Any] = {path: {"get": {"responses": _responses(401, 403)}} for path in READS}
    for path in ("/health", "/ready"):  # their 503 is an answer, not an error
        paths[path]["get"]["responses"]["503"] = {
            "description": "not ready",
            "content": {"application/json": {}},
        }
    for path, body in BODIES.items():
        asked = {
            "required": True,
            "content": {"application/json": {"schema": names[body, "validation"]}},
        }
        refusals = (400, 401, 403, 404, 409, 413, 415, 429, 503, 504)
        paths[path] = {"post": {"requestBody": asked, "responses": _responses(*refusals)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "bascule", "version": metadata.version("bascule")},
        "paths": paths,
        "components": {"schemas": {**schemas["$defs"], "Error": ERROR}},
    }


def _bound_ids(schema: dict[str, Any], vocab_size: int) -> None:
    """Say of every integer in lists, and in lists of lists, that it is a token's id."""
    while schema["type"] == "array":
        schema = schema["items"]
    if schema["type"] == "integer":
        schema.update(minimum=0, maximum=vocab_size - 1)


def _responses(*refusals: int) -> dict[str, Any]:
    answer = {
        "description": "the answer",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"200": answer} | {
        str(status): {"description": "refused", "content": error} for status in refusals
    }
