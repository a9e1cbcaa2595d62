"""What a request costs, and usage with its cost: a TOML file with prices per million tokens, and exact integer arithmetic.

    currency = "USD"                      # optional, only shown

    [default]                             # optional: every model that is not named
    prompt = 0.10
    output = 0.40

    [models."llama-3.1-8b"]
    prompt = 0.15                         # per million tokens, at most six decimals
    cached = 0.075                        # prompt tokens from the prefix cache; `prompt` if not given
    output = 0.60

Costs are whole micro-units (a millionth of the currency), rounded half to even once per request, so that every database and every order
of addition gives the same sum.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from penstock.core.errors import ConfigError
from penstock.serving.gateway.accounts.interface import UsageRecord

MICROS = 1_000_000
_TOKENS_PER_PRICE = 1_000_000
# Keeps the cost of any request inside a 64-bit integer.
_HIGHEST_PRICE = 1_000_000
_HIGHEST_TOKENS = 1 << 40
# The primary key of usage_daily has three texts, and PostgreSQL takes 2704 bytes in a row of an index.
_LONGEST_TEXT_BYTES = 768
_LATEST = 253402300799.0  # the last second of the year 9999
_FREE_SOURCES = ("hit", "coalesced")


@dataclass(frozen=True, slots=True)
class Price:
    """Micro-units of the currency per million tokens."""

    prompt: int
    cached: int
    output: int


@dataclass(frozen=True, slots=True)
class PriceTable:
    """Prices by served model name. `default` is for all others; without it they cost nothing."""

    models: Mapping[str, Price] = field(default_factory=dict)
    default: Price | None = None
    currency: str | None = None

    def cost_micros(self, usage: UsageRecord) -> int:
        """What a request costs, in micro-units. An answer that another request paid for costs nothing."""
        price = self.models.get(usage.model, self.default)
        if price is None or usage.cache in _FREE_SOURCES:
            return 0
        prompt = _bounded(usage.prompt_tokens)
        cached = min(_bounded(usage.cached_tokens), prompt)
        total = (prompt - cached) * price.prompt + cached * price.cached + _bounded(usage.output_tokens) * price.output
        return _divide_half_even(total, _TOKENS_PER_PRICE)

    def unpriced(self, models: Iterable[str]) -> list[str]:
        """Those of `models` that cost nothing only because a table that has prices does not name them."""
        return sorted(set(models) - set(self.models)) if self.models and self.default is None else []


FREE = PriceTable()


class PricedUsage(msgspec.Struct, frozen=True, array_like=True):
    """Usage with the cost that it had when it was recorded: a new price table does not change the past."""

    usage: UsageRecord
    cost_micros: int


def storable(usage: UsageRecord) -> UsageRecord:
    """`usage` as every store takes it: texts bounded and without NUL and lone surrogates, counts within 64 bits, a real time.

    Names come from keys and from JWTs that others issue; one that a database refuses must not cost the batch that it is in.
    """
    return msgspec.structs.replace(
        usage,
        request_id=_text(usage.request_id),
        at=min(max(usage.at, 0.0), _LATEST) if usage.at == usage.at else 0.0,
        key_id=_text(usage.key_id),
        tenant=_text(usage.tenant),
        model=_text(usage.model),
        prompt_tokens=_bounded(usage.prompt_tokens),
        cached_tokens=_bounded(usage.cached_tokens),
        output_tokens=_bounded(usage.output_tokens),
    )


def load_prices(path: str | Path) -> PriceTable:
    """The table in a file. Raises ConfigError that names file, model and field."""
    try:
        with Path(path).open("rb") as file:
            content = tomllib.load(file, parse_float=Decimal)
    except OSError as error:
        raise ConfigError(f"--price-table {path}: {error.strerror or error}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--price-table {path} is not valid TOML: {error}") from None
    return parse_prices(content, str(path))


def parse_prices(content: Mapping[str, Any], path: str) -> PriceTable:
    """The table in the parsed content of `path`."""
    _check_names(content, ("currency", "default", "models"), path, "the top level")
    currency = content.get("currency")
    if currency is not None and not (isinstance(currency, str) and currency.isprintable() and 0 < len(currency) <= 8):
        raise ConfigError(f'{path}: currency must be a short text such as "USD", not {currency!r}.')
    models = content.get("models", {})
    if not isinstance(models, dict):
        raise ConfigError(f'{path}: models must be tables such as [models."NAME"], not {models!r}.')
    default = content.get("default")
    return PriceTable(
        models={name: _price(price, path, f'[models."{name}"]') for name, price in models.items()},
        default=None if default is None else _price(default, path, "[default]"),
        currency=currency,
    )


def _price(fields: object, path: str, where: str) -> Price:
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: {where} must be a table with prompt and output, not {fields!r}.")
    _check_names(fields, ("prompt", "cached", "output"), path, where)
    for name in ("prompt", "output"):
        if name not in fields:
            raise ConfigError(f"{path}: {where} has no {name}; give a price per million tokens, 0 for none.")
    prices = {name: _micros(value, f"{path}: {where} {name}") for name, value in fields.items()}
    return Price(prompt=prices["prompt"], cached=prices.get("cached", prices["prompt"]), output=prices["output"])


def _micros(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ConfigError(f"{where} must be a number, not {value!r}.")
    price = Decimal(value)
    if not (price.is_finite() and 0 <= price <= _HIGHEST_PRICE):
        raise ConfigError(f"{where} must be between 0 and {_HIGHEST_PRICE}, not {value}.")
    micros = price.scaleb(6)
    if micros != int(micros):
        raise ConfigError(f"{where} must have at most six decimals, not {value}.")
    return int(micros)


def _check_names(fields: Mapping[str, Any], known: tuple[str, ...], path: str, where: str) -> None:
    for name in fields:
        if name not in known:
            raise ConfigError(f"{path}: {where} has the unknown field {name!r}; known are {', '.join(known)}.")


def _text(text: str) -> str:
    return text.encode("utf-8", "replace").replace(b"\0", b"?")[:_LONGEST_TEXT_BYTES].decode("utf-8", "ignore")


def _bounded(tokens: int) -> int:
    return min(max(tokens, 0), _HIGHEST_TOKENS)


def _divide_half_even(total: int, divisor: int) -> int:
    quotient, rest = divmod(total, divisor)
    round_up = 2 * rest > divisor or (2 * rest == divisor and quotient % 2 == 1)
    return quotient + round_up
