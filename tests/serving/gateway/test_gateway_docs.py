"""docs/api.md names every route and every field that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.config import ServerConfig
from penstock.serving.gateway.app import create_app
from penstock.serving.gateway.schemas.base import RequestModel
from penstock.serving.gateway.schemas.chat import ChatBody, Message
from penstock.serving.gateway.schemas.completions import CompletionBody
from penstock.serving.gateway.schemas.other import DetokenizeBody, LimitsBody, TokenizeBody

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()


@pytest.mark.parametrize("model", [ChatBody, Message, CompletionBody, TokenizeBody, DetokenizeBody, LimitsBody])
def test_every_field_is_documented(model: type[RequestModel]) -> None:
    fields = [*model.model_fields, *model.NEUTRAL]
    undocumented = [name for name in fields if f"`{name}`" not in PAGE and name not in ("role", "content", "name")]
    assert not undocumented


def test_every_route_is_documented() -> None:
    paths = create_app({}, ServerConfig()).openapi()["paths"]
    assert [path for path in paths if path.replace("{model}", "{id}") not in PAGE] == []
