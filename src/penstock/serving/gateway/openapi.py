"""Describes the real bodies in /openapi.json: requests from the pydantic models, responses from the msgspec objects."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from penstock.serving.gateway.generation import chat, completions
from penstock.serving.gateway.routes import limits, tokens
from penstock.serving.gateway.schemas import admin, responses
from penstock.serving.gateway.schemas.base import RequestModel
from penstock.serving.gateway.schemas.chat import ChatBody
from penstock.serving.gateway.schemas.completions import CompletionBody
from penstock.serving.gateway.schemas.other import DetokenizeBody, LimitsBody, TokenizeBody

_REF = "#/components/schemas/"

_REQUESTS: dict[tuple[str, str], type[RequestModel]] = {
    (completions.PATH, "post"): CompletionBody,
    (chat.PATH, "post"): ChatBody,
    (tokens.TOKENIZE_PATH, "post"): TokenizeBody,
    (tokens.DETOKENIZE_PATH, "post"): DetokenizeBody,
    (limits.PATH, "patch"): LimitsBody,
    ("/admin/keys", "post"): admin.CreateKeyBody,
    ("/admin/keys/{key_id}/rotate", "post"): admin.RotateKeyBody,
    ("/admin/tenants/{name}", "put"): admin.TenantBody,
}
_RESPONSES: dict[tuple[str, str], type[msgspec.Struct]] = {
    (completions.PATH, "post"): responses.Completion,
    (chat.PATH, "post"): responses.ChatCompletion,
    (tokens.TOKENIZE_PATH, "post"): responses.Tokenized,
    (tokens.DETOKENIZE_PATH, "post"): responses.Detokenized,
    (limits.PATH, "patch"): responses.Limits,
    (limits.PATH, "get"): responses.Limits,
    ("/v1/models", "get"): responses.ModelList,
    ("/v1/models/{model}", "get"): responses.Model,
    ("/health", "get"): responses.Status,
    ("/health/live", "get"): responses.Status,
    ("/health/ready", "get"): responses.Status,
    ("/version", "get"): responses.Version,
    ("/admin/keys", "post"): admin.KeyObject,
    ("/admin/keys", "get"): admin.KeyList,
    ("/admin/keys/{key_id}", "get"): admin.KeyObject,
    ("/admin/keys/{key_id}", "delete"): admin.KeyObject,
    ("/admin/keys/{key_id}/rotate", "post"): admin.KeyObject,
    ("/admin/tenants", "get"): admin.TenantList,
    ("/admin/tenants/{name}", "get"): admin.TenantObject,
    ("/admin/tenants/{name}", "put"): admin.TenantObject,
}
_STREAMS: dict[str, type[msgspec.Struct]] = {completions.PATH: responses.Completion, chat.PATH: responses.ChatChunk}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document; made once, when first asked for."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        # A server without accounts has no admin routes, and then no words for them.
        requests = [model for (path, _), model in _REQUESTS.items() if path in schema["paths"]]
        _, definitions = models_json_schema(
            [(model, "validation") for model in requests], ref_template=_REF + "{model}"
        )
        answered = {struct for (path, _), struct in _RESPONSES.items() if path in schema["paths"]}
        structs = {*answered, *_STREAMS.values(), responses.ErrorBody}
        _, answers = msgspec.json.schema_components(
            sorted(structs, key=lambda s: s.__name__), ref_template=_REF + "{name}"
        )
        schema["components"] = {"schemas": {**definitions["$defs"], **answers}}
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                _describe_operation(path, method, operation)
        app.openapi_schema = schema
    return app.openapi_schema


def _describe_operation(path: str, method: str, operation: dict[str, Any]) -> None:
    request = _REQUESTS.get((path, method))
    if request is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": _ref(request.__name__)}}
    response = _RESPONSES.get((path, method))
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if response is not None:
        content = {"application/json": _ref(response.__name__)}
    if path in _STREAMS:
        content["text/event-stream"] = {
            "schema": {
                "type": "object",
                "description": f"Each event's data is a {_STREAMS[path].__name__} object as JSON; the last is [DONE].",
                "properties": {"data": {"type": "string"}},
                "required": ["data"],
            }
        }
    operation["responses"] = {
        "200": {"description": "Success.", "content": content},
        "default": {"description": "OpenAI's error object.", "content": {"application/json": _ref("ErrorBody")}},
    }


def _ref(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": _REF + name}}
