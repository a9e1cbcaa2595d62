"""Flags, environment variables and the configuration page all come from the configuration classes."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path

import pytest

from penstock.cli.options import sections_of, setting_options
from penstock.cli.reference import configuration_page
from penstock.core.config import EngineConfig, ServerConfig, flag_name
from penstock.core.errors import ConfigError
from penstock.core.gateway_config import GatewayConfig
from tests.cli.conftest import Invoke

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerConfig, GatewayConfig]]:
    """What `penstock serve` would have served."""
    calls: list[tuple[EngineConfig, ServerConfig, GatewayConfig]] = []

    def serve(engine: EngineConfig, server: ServerConfig, gateway: GatewayConfig) -> int:
        calls.append((engine, server, gateway))
        return 0

    module = types.ModuleType("penstock.launch")
    module.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "penstock.launch", module)
    return calls


Served = list[tuple[EngineConfig, ServerConfig, GatewayConfig]]


def test_defaults_are_those_of_the_classes(invoke: Invoke, served: Served, model_folder: str) -> None:
    assert invoke("serve", model_folder).code == 0
    assert served == [(EngineConfig(model=model_folder), ServerConfig(), GatewayConfig())]


def test_flags_of_every_type(invoke: Invoke, served: Served, model_folder: str) -> None:
    flags = "--port 0 --dtype bfloat16 --kv-cache-gib 0.25 --no-prefix-caching --served-model-name tiny --auth keys,jwt"
    assert invoke("serve", model_folder, *flags.split()).code == 0
    engine, server, gateway = served[0]
    assert engine == EngineConfig(model=model_folder, dtype="bfloat16", kv_cache_gib=0.25, prefix_caching=False)
    assert server == ServerConfig(port=0, served_model_name="tiny")
    assert gateway.auth_methods == ("keys", "jwt")


def test_environment_is_below_flags_and_above_defaults(
    invoke: Invoke, served: Served, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_MODEL", model_folder)
    monkeypatch.setenv("PENSTOCK_PORT", "9000")
    monkeypatch.setenv("PENSTOCK_MAX_NUM_SEQS", "4")
    monkeypatch.setenv("PENSTOCK_PREFIX_CACHING", "0")
    assert invoke("serve", "--max-num-seqs", "8").code == 0
    engine, server, _ = served[0]
    assert engine == EngineConfig(model=model_folder, max_num_seqs=8, prefix_caching=False)
    assert server.port == 9000


@pytest.mark.parametrize("config_class", [EngineConfig, ServerConfig])
def test_every_field_has_one_flag_in_one_section(config_class: type[EngineConfig] | type[ServerConfig]) -> None:
    fields = [field.name for field in dataclasses.fields(config_class) if field.name != "model"]
    options = {option.name: option for option in setting_options(config_class)}
    assert sorted(options) == sorted(fields)
    assert sorted(name for names in sections_of(config_class).values() for name in names) == sorted(fields)
    assert all(flag_name(name) in option.opts for name, option in options.items())
    assert all(option.help for option in options.values())


def test_configuration_page_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration_page(), "run `make docs`"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size must be at least 1"),
        ({"pipeline_parallel_size": 0}, "--pipeline-parallel-size must be at least 1"),
        ({"tensor_parallel_size": 2, "local_ranks": 3}, "--local-ranks 3 is above the 2 ranks"),
        ({"tensor_parallel_size": 2, "local_ranks": 1}, "leaves 1 ranks to other machines: give --worker-address"),
        ({"worker_address": "here"}, "--worker-address must be HOST:PORT, not 'here'"),
        ({"worker_address": "a:99999"}, "--worker-address must be HOST:PORT"),
        ({"num_speculative_tokens": 3}, "--num-speculative-tokens needs --speculative-model"),
        ({"speculative_model": "ngram", "num_speculative_tokens": 17}, "must be between 0 and 16, not 17"),
    ],
)
def test_settings_of_ranks_and_speculation_are_checked(settings: dict[str, int | str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        EngineConfig(**settings)  # type: ignore[arg-type]
    assert EngineConfig(tensor_parallel_size=2, pipeline_parallel_size=3).num_ranks == 6
