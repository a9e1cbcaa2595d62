"""What a key and a tenant may be set to, and how people write money, times and durations."""

from __future__ import annotations

import datetime
import math
import re
from dataclasses import dataclass, fields
from decimal import Decimal, DecimalException
from typing import Any

from penstock.core.errors import InvalidRequestError
from penstock.serving.gateway.accounts.prices import MICROS

MAX_LIMIT = 10**12
MAX_MODELS = 100
MAX_MODEL_NAME = 256
MAX_LABEL = 200
MAX_PRIORITY = 2**31 - 1
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
MAX_BUDGET = 10**9
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,127}")
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)([smhdw])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_MAX_TEXT_SHOWN = 64
# Digits within the precision of decimal, so that nothing is rounded.
_MAX_NUMBER = 24


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """Limits that all keys of a tenant share (None: no limit) and its share of a busy engine (None: 1)."""

    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    weight: float | None = None

    def check(self) -> None:
        """Raises InvalidRequestError naming the field."""
        _check_limits(self)

    def columns(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySettings:
    """What can be chosen of a key. `models`: names that may be used (None: all). `priority`: added to a request's own, lower is served
    first. `budget_micros`: millionths of the price table's currency that the key may cost in its life. `expires_at`: Unix seconds."""

    label: str = ""
    models: tuple[str, ...] | None = None
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    priority: int = 0
    weight: float | None = None
    budget_micros: int | None = None
    expires_at: float | None = None

    def check(self, now: float) -> None:
        """Raises InvalidRequestError naming the field."""
        _check_limits(self)
        if len(self.label) > MAX_LABEL or not self.label.isprintable():
            raise _invalid("label", f"must be at most {MAX_LABEL} printable characters")
        if self.models is not None:
            if not 1 <= len(self.models) <= MAX_MODELS:
                raise _invalid("models", f"must have between 1 and {MAX_MODELS} names")
            if not all(1 <= len(name) <= MAX_MODEL_NAME and name.isprintable() for name in self.models):
                raise _invalid("models", f"must be names of 1 to {MAX_MODEL_NAME} printable characters")
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise _invalid("priority", f"must be between {-MAX_PRIORITY} and {MAX_PRIORITY}")
        if self.budget_micros is not None and not 0 <= self.budget_micros <= MAX_BUDGET * MICROS:
            raise _invalid("budget", f"must be between 0 and {MAX_BUDGET}")
        if self.expires_at is not None and not now < self.expires_at <= now + 1000 * 366 * 86400:
            raise _invalid("expires", "must be in the future, and not by a thousand years")

    def columns(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"models": None if self.models is None else list(self.models)}


def is_tenant_name(name: str) -> bool:
    """Whether a tenant can have this name."""
    return _TENANT.fullmatch(name) is not None


def check_tenant_name(name: str) -> None:
    """Raises InvalidRequestError."""
    if not is_tenant_name(name):
        raise _invalid("tenant", "must be 1 to 128 letters, digits and ._@:- and begin with a letter or digit")


def parse_budget(text: str) -> int:
    """Millionths of a decimal number such as 12.50, exactly. Raises InvalidRequestError."""
    try:
        micros = Decimal(text) * MICROS if len(text) <= _MAX_NUMBER else Decimal("NaN")
    except DecimalException:
        micros = Decimal("NaN")
    if not micros.is_finite() or not 0 <= micros <= MAX_BUDGET * MICROS or micros != int(micros):
        raise _invalid(
            "budget", f"must be a number such as 12.50, at most {MAX_BUDGET}, with at most six decimal places"
        )
    return int(micros)


def show_money(micros: int) -> str:
    """12500000 → "12.50": at least two decimal places, no digit lost."""
    whole, rest = divmod(micros, MICROS)
    digits = f"{rest:06d}".rstrip("0").ljust(2, "0")
    return f"{whole}.{digits}"


def parse_duration(text: str, param: str) -> float:
    """Seconds of a duration such as 90s, 10m, 12h, 30d or 2w. Raises InvalidRequestError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise _invalid(param, f"must be a duration such as 90s, 10m, 12h or 30d, not {text[:_MAX_TEXT_SHOWN]!r}")
    return float(match[1]) * _UNITS[match[2]]


def parse_expiry(text: str, now: float) -> float:
    """Unix seconds of a duration from now (30d), a date (2027-01-01: its first moment, UTC) or a time (2027-01-01T12:00Z; without zone
    UTC). Raises InvalidRequestError."""
    if _DURATION.fullmatch(text):
        return now + parse_duration(text, "expires")
    try:
        moment = datetime.datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, OverflowError):
        raise _invalid(
            "expires", f"must be a duration such as 30d or a date such as 2027-01-01, not {text[:_MAX_TEXT_SHOWN]!r}"
        ) from None


def _check_limits(settings: TenantSettings | KeySettings) -> None:
    for name in ("rpm", "tpm", "concurrency"):
        value: int | None = getattr(settings, name)
        if value is not None and not 1 <= value <= MAX_LIMIT:
            raise _invalid(name, f"must be between 1 and {MAX_LIMIT}")
    weight = settings.weight
    if weight is not None and not (math.isfinite(weight) and MIN_WEIGHT <= weight <= MAX_WEIGHT):
        raise _invalid("weight", f"must be between {MIN_WEIGHT} and {MAX_WEIGHT:g}")


def _invalid(param: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"'{param}' {rule}.", param=param, code="invalid_value")
