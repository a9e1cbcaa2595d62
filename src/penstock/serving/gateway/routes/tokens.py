"""POST /v1/tokenize and /v1/detokenize."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from penstock.serving.gateway.answers import json_response
from penstock.serving.gateway.body import read_object
from penstock.serving.gateway.context import context_of
from penstock.serving.gateway.schemas.other import DetokenizeBody, TokenizeBody
from penstock.serving.gateway.schemas.responses import Detokenized, Tokenized
from penstock.serving.gateway.state import Gateway

TOKENIZE_PATH = "/v1/tokenize"
DETOKENIZE_PATH = "/v1/detokenize"


def add_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.post(TOKENIZE_PATH, response_model=None, summary="Token ids of a text or a conversation.", tags=["tokens"])
    async def tokenize(request: Request) -> Response:
        body = TokenizeBody.parse(await read_object(request))
        prompt = body.engine_prompt()
        _, client = gateway.resolve(body.model, context_of(request.scope).identity)
        tokens = await client.tokenize(prompt)
        info = await client.model_info()
        return json_response(Tokenized(len(tokens), info.max_model_len, tokens))

    @app.post(DETOKENIZE_PATH, response_model=None, summary="Text of token ids.", tags=["tokens"])
    async def detokenize(request: Request) -> Response:
        body = DetokenizeBody.parse(await read_object(request))
        _, client = gateway.resolve(body.model, context_of(request.scope).identity)
        text = await client.detokenize(body.tokens)
        return json_response(Detokenized(text, text))
