"""The routes around generation: health, models, tokenize, limits, metrics."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from penstock.core.config import ServerConfig
from penstock.serving.frontend.client import Health
from penstock.testing.gateway_server import MODEL, GatewayServer, error_of


def test_readiness_follows_the_engine(server: GatewayServer, http: httpx.Client) -> None:
    assert http.get("/health/ready").json() == {"status": "ready"}
    server.client.health_now = Health(live=True, ready=False, reason="loading")
    for path in ("/health/ready", "/health"):
        response = http.get(path)
        assert response.status_code == 503
        assert "loading" in error_of(response)["message"]
    assert http.get("/health/live").status_code == 200
    response = http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_dead")


def test_models_are_listed_while_the_engine_is_dead(server: GatewayServer, api: openai.OpenAI) -> None:
    assert [(model.id, model.model_extra) for model in api.models.list()] == [(MODEL, {"max_model_len": 4096})]
    server.client.health_now = Health(live=False, ready=False)
    assert [(model.id, model.model_extra) for model in api.models.list()] == [(MODEL, {})]
    assert api.models.retrieve(MODEL).owned_by == "penstock"


def test_names_with_slashes_are_models_too() -> None:
    with GatewayServer() as server:
        clients: Any = server.gateway.clients
        clients["org/name"] = server.client
        api = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        assert api.models.retrieve("org/name").id == "org/name"
        with pytest.raises(openai.BadRequestError, match="Several models"):
            api.post("/tokenize", body={"text": "a"}, cast_to=object)
        api.close()


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "ab"}, [256, 97, 98]),
        ({"text": "ab", "model": MODEL}, [256, 97, 98]),
        ({"text": "", "add_special_tokens": False}, []),
        ({"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False}, [256, *b"<user>a"]),
    ],
)
def test_tokenize_and_back(http: httpx.Client, body: dict[str, Any], tokens: list[int]) -> None:
    answer = http.post("/v1/tokenize", json=body).json()
    assert answer == {"count": len(tokens), "max_model_len": 4096, "tokens": tokens}
    back = http.post("/v1/detokenize", json={"tokens": tokens}).json()
    assert back["text"] == back["prompt"] == bytes(token for token in tokens if token < 256).decode()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("tokenize", {}),
        ("tokenize", {"prompt": "a", "text": "b"}),
        ("tokenize", {"prompt": ["a"]}),
        ("tokenize", {"messages": []}),
        ("detokenize", {}),
        ("detokenize", {"tokens": "a"}),
        ("detokenize", {"tokens": [-1]}),
        ("detokenize", {"tokens": [True]}),
        ("detokenize", {"tokens": [99999]}),
    ],
)
def test_tokenize_refusals(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    response = http.post(f"/v1/{path}", json=body)
    assert response.status_code == 400
    error_of(response)


def test_limits_change_while_running(server: GatewayServer, http: httpx.Client) -> None:
    before = http.get("/v1/engine/limits").json()
    assert before == {
        "model": MODEL,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 64,
        "max_prefill_tokens_while_decoding": 128,
    }
    assert http.patch("/v1/engine/limits", json={"max_num_seqs": 8}).json() == {**before, "max_num_seqs": 8}
    assert http.get("/v1/engine/limits").json()["max_num_seqs"] == 8
    assert http.patch("/v1/engine/limits", json={"max_num_seqs": 64}).status_code == 200
    for body, param in (({"max_num_seqs": 65}, "max_num_seqs"), ({"max_num_seqs": 0}, "max_num_seqs"), ({"x": 1}, "x")):
        response = http.patch("/v1/engine/limits", json=body)
        assert (response.status_code, error_of(response)["param"]) == (400, param)


def test_limits_are_fixed_for_others_when_the_server_is_public() -> None:
    with GatewayServer(ServerConfig(port=0, host="0.0.0.0")) as server:  # noqa: S104
        api = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.PermissionDeniedError):
            api.patch("/engine/limits", body={"max_num_seqs": 8}, cast_to=object)
        assert httpx.get(server.url + "/v1/engine/limits").status_code == 200
        api.close()


def test_metrics_count_what_happened(server: GatewayServer, api: openai.OpenAI, http: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)

    names = [
        f'penstock_requests_total{{model="{MODEL}",outcome="completed"}}',
        f'penstock_requests_total{{model="{MODEL}",outcome="invalid"}}',
        f'penstock_generation_tokens_total{{model="{MODEL}"}}',
        f'penstock_prompt_tokens_total{{model="{MODEL}"}}',
        f'penstock_time_to_first_token_seconds_count{{model="{MODEL}"}}',
        f'penstock_inter_token_seconds_count{{model="{MODEL}"}}',
        'penstock_http_requests_total{method="POST",route="/v1/completions",status="4xx"}',
        f'penstock_queue_seconds_count{{model="{MODEL}"}}',
    ]
    before = [value(name) for name in names]
    api.completions.create(model=MODEL, prompt="abc", max_tokens=5)
    with pytest.raises(openai.BadRequestError):
        api.completions.create(model=MODEL, prompt="abc", max_tokens=5000)
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [1, 1, 5, 4, 1, 4, 1, 1]
    assert value("penstock_engine_kv_usage_ratio") == 0.25
    assert value("penstock_engine_restarts_total") == 0
    server.client.health_now = Health(live=True, ready=True, details={"restarts": 2})
    assert value("penstock_engine_restarts_total") == 2
    assert value(f'penstock_requests_in_flight{{model="{MODEL}"}}') == 0
    assert value('penstock_build_info{version="1.2.3"}') == 1
    assert http.get("/version").json() == {"version": "1.2.3"}
