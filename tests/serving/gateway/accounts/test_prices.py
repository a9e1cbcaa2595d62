"""Prices: exact costs, and errors that name file, model and field."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ConfigError
from penstock.serving.gateway.accounts.interface import UsageRecord
from penstock.serving.gateway.accounts.prices import FREE, Price, PriceTable, load_prices
from penstock.serving.gateway.cache.interface import CacheOutcome

TABLE = """
currency = "USD"
[default]
prompt = 1
output = 2
[models."small"]
prompt = 0.15
cached = 0.075
output = 0.6
[models."org/with.dots"]
prompt = 0.000001
output = 0
"""


def usage(
    model: str = "small", prompt: int = 0, cached: int = 0, output: int = 0, cache: CacheOutcome = "miss"
) -> UsageRecord:
    return UsageRecord(
        request_id="r",
        at=0.0,
        key_id="k",
        tenant="t",
        model=model,
        outcome="completed",
        cache=cache,
        prompt_tokens=prompt,
        cached_tokens=cached,
        output_tokens=output,
    )


@pytest.fixture
def table(tmp_path: Path) -> PriceTable:
    path = tmp_path / "prices.toml"
    path.write_text(TABLE)
    return load_prices(path)


def test_file_is_read_exactly(table: PriceTable) -> None:
    assert table.currency == "USD"
    assert table.models["small"] == Price(150_000, 75_000, 600_000)
    assert table.models["org/with.dots"] == Price(1, 1, 0)
    assert table.default == Price(1_000_000, 1_000_000, 2_000_000)


def test_cost_of_prompt_cached_and_output_tokens(table: PriceTable) -> None:
    # 600 × 0.15 + 400 × 0.075 + 100 × 0.6 micro-units
    assert table.cost_micros(usage(prompt=1000, cached=400, output=100)) == 90 + 30 + 60
    assert table.cost_micros(usage(model="unknown", prompt=10, output=5)) == 20


def test_rounded_half_to_even_once_per_request() -> None:
    half = PriceTable(default=Price(500_000, 500_000, 500_000))
    assert [half.cost_micros(usage(prompt=tokens)) for tokens in (1, 2, 3, 4, 5)] == [0, 1, 2, 2, 2]
    # One rounding of the sum: two halves are a whole.
    assert half.cost_micros(usage(prompt=1, output=1)) == 1


@pytest.mark.parametrize("cache", ["hit", "coalesced"])
def test_answers_that_another_request_paid_for_are_free(table: PriceTable, cache: CacheOutcome) -> None:
    assert table.cost_micros(usage(prompt=1000, cached=1000, output=1000, cache=cache)) == 0


def test_without_a_table_everything_is_free() -> None:
    assert FREE.cost_micros(usage(prompt=10**9, output=10**9)) == 0
    assert FREE.unpriced(["a"]) == []


def test_unpriced_models(table: PriceTable) -> None:
    assert table.unpriced(["small", "other"]) == []
    assert PriceTable(models=table.models).unpriced(["small", "z", "other", "z"]) == ["other", "z"]


def test_absurd_counts_stay_within_64_bits() -> None:
    dearest = PriceTable(default=Price(*(1_000_000 * 1_000_000,) * 3))
    assert 0 < dearest.cost_micros(usage(prompt=10**30, output=10**6)) < 2**63
    assert dearest.cost_micros(usage(prompt=-5, cached=7, output=-1)) == 0


@given(
    prices=st.tuples(*(st.integers(0, 10**12),) * 3),
    prompt=st.integers(0, 10**6),
    cached=st.integers(0, 10**6),
    output=st.integers(0, 10**6),
)
def test_cost_equals_decimal_arithmetic(prices: tuple[int, int, int], prompt: int, cached: int, output: int) -> None:
    table = PriceTable(default=Price(*prices))
    cached = min(cached, prompt)
    exact = Decimal((prompt - cached) * prices[0] + cached * prices[1] + output * prices[2]) / 10**6
    expected = int(exact.quantize(Decimal(1), ROUND_HALF_EVEN))
    assert table.cost_micros(usage(model="any", prompt=prompt, cached=cached, output=output)) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[models."a"]\nprompt = -1\noutput = 1', ('[models."a"] prompt', "between 0")),
        ('[models."a"]\nprompt = 1', ('[models."a"]', "no output")),
        ('[models."a"]\nprompt = 1\noutput = "x"', ('[models."a"] output', "must be a number")),
        ('[models."a"]\nprompt = 1\noutput = true', ('[models."a"] output', "must be a number")),
        ("[default]\nprompt = nan\noutput = 1", ("[default] prompt", "between 0")),
        ("[default]\nprompt = inf\noutput = 1", ("[default] prompt", "between 0")),
        ("[default]\nprompt = 1e30\noutput = 1", ("[default] prompt", "between 0")),
        ("[default]\nprompt = 0.0000001\noutput = 1", ("[default] prompt", "six decimals")),
        ("[default]\nprompt = 1\noutput = 1\ninput = 1", ("[default]", "'input'", "prompt, cached, output")),
        ("models = 3", ("models",)),
        ("[models]\na = 3", ('[models."a"]', "table")),
        ("[model.a]\nprompt = 1\noutput = 1", ("'model'", "currency, default, models")),
        ("currency = 3", ("currency",)),
        ("prompt = ", ("not valid TOML",)),
    ],
)
def test_errors_name_file_model_and_field(tmp_path: Path, content: str, said: tuple[str, ...]) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_prices(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for part in said:
        assert part in message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: No such file"):
        load_prices(tmp_path / "no.toml")
