"""Sampling flags of `chat` and `generate`, made from SamplingParams' own bounds and defaults."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import click
import msgspec

from penstock.cli.options import SettingOption
from penstock.core.errors import InvalidRequestError
from penstock.core.types import SamplingParams

# flag → (type, help). Defaults are those of SamplingParams unless a command gives its own.
SAMPLING_FLAGS: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "Most tokens to generate."),
    "temperature": (float, "0 is greedy."),
    "top_p": (float, "Keep the most likely tokens up to this share of probability."),
    "top_k": (int, "Keep this many most likely tokens; 0 keeps all."),
    "min_p": (float, "Keep tokens with at least this share of the most likely one's probability."),
    "presence_penalty": (float, "Make tokens that occurred less likely, once."),
    "frequency_penalty": (float, "Make tokens that occurred less likely, per occurrence."),
    "repetition_penalty": (float, "Divide the score of tokens that occurred, prompt included; 1 is off."),
    "seed": (int, "Seed of the random numbers; drawn if not given."),
    "min_tokens": (int, "Least tokens to generate before an end."),
}


def with_sampling(**defaults: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: add the sampling flags to a command's function, with the command's own defaults."""
    neutral = SamplingParams()

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options: list[click.Parameter] = [_stop_option()]
        for name, (kind, text) in SAMPLING_FLAGS.items():
            default = defaults.get(name, getattr(neutral, name))
            flag = f"--{name.replace('_', '-')}"
            options.append(
                SettingOption(
                    [f"sampling_{name}", flag],
                    section="Sampling",
                    type=kind,
                    default=default,
                    show_default=default is not None,
                    help=text,
                )
            )
        parameters: list[click.Parameter] = getattr(function, "__click_params__", [])
        function.__click_params__ = [*parameters, *reversed(options)]  # type: ignore[attr-defined]
        return function

    return decorate


def sampling_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The sampling fields among a command's parsed values; those at None are left out."""
    prefix = "sampling_"
    fields = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return {name: value for name, value in fields.items() if value not in (None, ())}


def sampling_params(fields: dict[str, Any]) -> SamplingParams:
    """SamplingParams from plain values. Raises InvalidRequestError naming a field that is unknown or wrong."""
    known = SamplingParams.__struct_fields__
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            suggestion = f" Did you mean {close[0]!r}?" if close else ""
            raise InvalidRequestError(f"{name!r} is not a sampling parameter.{suggestion}", param=name)
    if isinstance(fields.get("stop"), str):
        fields = {**fields, "stop": (fields["stop"],)}
    try:
        # JSON has only text keys; token ids of logit_bias are numbers.
        return msgspec.convert(fields, SamplingParams, str_keys=True)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(str(error)) from error


def _stop_option() -> SettingOption:
    return SettingOption(
        ["sampling_stop", "--stop"],
        section="Sampling",
        multiple=True,
        help="Text that ends the output; may be repeated.",
    )
