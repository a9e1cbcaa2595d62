"""`penstock verify MODEL`: our logits and greedy tokens against transformers, on the model's own weights."""

from __future__ import annotations

import click

from penstock.cli.options import SettingsCommand
from penstock.core.config import EMBEDDED_MODEL
from penstock.testing.exactness import DEFAULT_MARGIN


@click.command(cls=SettingsCommand)
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--revision", help="Revision of a pulled hub model.")
@click.option(
    "--prompts", "num_prompts", type=click.IntRange(1, 1000), default=8, show_default=True, help="Number of prompts."
)
@click.option(
    "--tokens", "num_tokens", type=click.IntRange(1, 4096), default=32, show_default=True, help="Tokens per prompt."
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=1e-3, show_default=True, help="Largest difference of a logit."
)
@click.option(
    "--margin",
    type=click.FloatRange(min=0),
    default=DEFAULT_MARGIN,
    show_default=True,
    help="Tokens may part where the reference's top two logits are closer than this.",
)
def verify(model: str, revision: str | None, num_prompts: int, num_tokens: int, tolerance: float, margin: float) -> int:
    """Compare MODEL's logits and greedy tokens with transformers, in float32 on the CPU.

    Prints a line per prompt: its length, the largest difference of a logit over all its positions, and the first token that
    differs with the margin between the reference's two best tokens there. The exit code is 1 when something does not match.
    """
    from penstock.cli.packages import require

    require("verify", "transformers")
    from penstock.cli.pull import ensure_model

    folder = ensure_model(model, revision)
    from penstock.cli.comparison import compare

    click.echo(f"{folder}: float32, {num_prompts} prompts, {num_tokens} greedy tokens each")
    click.echo(f"{'prompt':>6} {'tokens':>6} {'max|Δlogit|':>12} {'first difference':>17} {'margin there':>13}  result")
    failed = 0
    for number, row in enumerate(compare(folder, num_prompts, num_tokens, margin)):
        ok = row.max_logit_difference <= tolerance and row.greedy.ok
        failed += not ok
        position = "none" if row.greedy.exact else str(row.greedy.first_difference)
        there = "" if row.greedy.reference_margin is None else f"{row.greedy.reference_margin:.2e}"
        verdict = "differs" if not ok else "equal" if row.greedy.exact else "equal up to a close call"
        line = f"{number:>6} {row.num_prompt_tokens:>6} {row.max_logit_difference:>12.2e} {position:>17} {there:>13}  {verdict}"
        click.echo(line)
    click.echo(f"{num_prompts - failed} of {num_prompts} prompts match.")
    return 1 if failed else 0
