"""Command-line options made from the configuration dataclasses, and the help page that shows them in sections.

A flag beats its environment variable PENSTOCK_<FIELD>, which beats the default. Only core is imported: building the help of
`penstock serve` must not load an engine.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from penstock.core.config import EngineConfig, ServerConfig, flag_name
from penstock.core.gateway_config import GatewayConfig

Config = TypeVar("Config", EngineConfig, ServerConfig, GatewayConfig)
ConfigClass = type[EngineConfig] | type[ServerConfig] | type[GatewayConfig]

# The order of sections and of fields in them. A field that stands nowhere here goes to its class's last section.
SECTIONS: dict[ConfigClass, dict[str, tuple[str, ...]]] = {
    EngineConfig: {
        "Model": (
            "revision",
            "load_format",
            "dtype",
            "device",
            "attention_backend",
            "threads",
            "max_model_len",
            "seed",
        ),
        "Several devices": ("tensor_parallel_size", "pipeline_parallel_size", "worker_address", "local_ranks"),
        "Speculative decoding": ("speculative_model", "num_speculative_tokens"),
        "Memory": ("memory_utilization", "kv_cache_gib", "swap_space_gib", "block_size", "prefix_caching"),
        "Scheduling": (),
    },
    ServerConfig: {
        "HTTP server": ("host", "port", "served_model_name", "max_body_bytes", "request_timeout_s"),
        "Streaming": ("stream_coalesce_s", "sse_ping_s"),
        "Log": ("log_level", "log_format"),
        "Supervision": (),
    },
    GatewayConfig: {
        "Who may ask": (
            "auth",
            "admin_key_file",
            "open_routes",
            "allowed_hosts",
            "cors_origins",
            "metrics_token_file",
            "metrics_port",
            "metrics_host",
        ),
        "JSON web tokens": (
            "jwt_algorithm",
            "jwt_secret_file",
            "jwt_jwks",
            "jwt_issuer",
            "jwt_audience",
            "jwt_leeway_s",
            "jwt_tenant_claim",
            "jwt_role_claim",
            "jwt_limits_claim",
        ),
        "Accounts and shared state": (
            "database_url",
            "redis_url",
            "redis_timeout_s",
            "redis_limits_failure",
            "price_table",
            "usage_spool_mib",
        ),
        "Limits": ("default_rpm", "default_tpm", "default_concurrency", "tokens_counted", "reserve_output_tokens"),
        "Response cache": (
            "response_cache",
            "response_cache_mib",
            "response_cache_ttl_s",
            "response_cache_shared",
        ),
        "Proxies and TLS": ("root_path", "forwarded_allow_ips", "ssl_certfile", "ssl_keyfile"),
        "Admission and connections": (),
    },
}


class SettingOption(click.Option):
    """An option with the section of the help page that it belongs to."""

    def __init__(self, param_decls: list[str], *, section: str, **attributes: Any) -> None:
        super().__init__(param_decls, **attributes)
        self.section = section

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Name the environment variable when the wrong value came from there."""
        if ctx is not None and self.name and ctx.get_parameter_source(self.name) is ParameterSource.ENVIRONMENT:
            return f"environment variable {self.envvar}"
        return super().get_error_hint(ctx)


class SettingsCommand(click.Command):
    """A command whose help shows options in their sections; accepts --debug like every command."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.params.append(debug_option())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                section = parameter.section if isinstance(parameter, SettingOption) else "Options"
                sections.setdefault(section, []).append(record)
        general = sections.pop("Options", [])
        for title, records in [*sections.items(), ("Options", general)]:
            with formatter.section(title):
                formatter.write_dl(records)


def debug_option() -> click.Option:
    """--debug; `penstock.cli.main` looks for it before anything is parsed."""
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        help="Show a traceback when something fails (also PENSTOCK_DEBUG=1).",
    )


def setting_options(config_class: ConfigClass) -> list[SettingOption]:
    """One option per field that has a flag, in the order of the sections."""
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    fields = {name: field for name, field in fields.items() if field.metadata.get("flag") != "(argument)"}
    ordered = sections_of(config_class)
    return [_option(fields[name], hints[name], section) for section, names in ordered.items() for name in names]


def sections_of(config_class: ConfigClass) -> dict[str, list[str]]:
    """Every field with a flag, by section; fields that no section names are in the last one."""
    names = [f.name for f in dataclasses.fields(config_class) if f.metadata.get("flag") != "(argument)"]
    placed = {name for section in SECTIONS[config_class].values() for name in section}
    sections = {title: [n for n in listed if n in names] for title, listed in SECTIONS[config_class].items()}
    sections[list(sections)[-1]] += [name for name in names if name not in placed]
    return sections


def with_settings(
    *config_classes: ConfigClass, without: frozenset[str] = frozenset()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: add the options of the configuration classes to a command's function, except the fields `without`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters: list[click.Parameter] = getattr(function, "__click_params__", [])
        # click collects parameters bottom-up and reverses them at the end.
        options = [option for config_class in config_classes for option in setting_options(config_class)]
        options = [option for option in options if option.name not in without]
        function.__click_params__ = [*parameters, *reversed(options)]  # type: ignore[attr-defined]
        return function

    return decorate


def config_from(config_class: type[Config], values: dict[str, Any]) -> Config:
    """The configuration object from a command's parsed values; ignores values of other classes. Raises ConfigError."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in values.items() if name in names})


def environment_variable(field_name: str) -> str:
    return f"PENSTOCK_{field_name.upper()}"


def _option(field: dataclasses.Field[Any], hint: Any, section: str) -> SettingOption:
    flag = flag_name(field.name)
    choices = field.metadata.get("choices")
    is_bool = hint is bool
    declaration = f"{flag}/--no-{flag[2:]}" if is_bool else flag
    return SettingOption(
        [field.name, declaration],
        section=section,
        type=click.Choice(list(choices)) if choices else _parameter_type(hint),
        default=field.default,
        show_default=field.default is not None,
        envvar=environment_variable(field.name),
        help=field.metadata["help"],
    )


def _parameter_type(hint: Any) -> click.ParamType[Any]:
    """`str | None` is text on a command line; everything else is what it says."""
    return {bool: click.BOOL, int: click.INT, float: click.FLOAT}.get(hint, click.STRING)
