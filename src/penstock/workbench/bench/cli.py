"""`penstock bench serve | offline | startup`: measure any OpenAI-compatible server, an engine in this process, or start-up time."""

from __future__ import annotations

import dataclasses
import random
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from penstock.core.config import EMBEDDED_MODEL, EngineConfig, flag_name
from penstock.core.errors import ConfigError
from penstock.workbench.bench.workload import DEFAULT_TOKEN_RANGE, Lengths, Workload

if typing.TYPE_CHECKING:
    from penstock.workbench.bench.client import Target
    from penstock.workbench.bench.report import Report, ServeReport

Function = TypeVar("Function", bound=Callable[..., Any])
PARAMETER_TYPES: dict[Any, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT}
# Prompts and outputs of the default run.
DEFAULT_INPUT, DEFAULT_OUTPUT = "128", "64"


@click.group()
def bench() -> None:
    """Measure throughput and latency.

    Prompts are random token ids of exact lengths; each is unique unless --prefix-share says otherwise, so that a prefix cache does not
    flatter the result. Times are measured by the client, from when a request was due.
    """


def workload_options(function: Function) -> Function:
    """The options that describe a Workload, and where the JSON goes."""
    options = [
        click.option(
            "--input-tokens",
            default=DEFAULT_INPUT,
            show_default=True,
            help="Prompt length: N, or LOW:HIGH for uniform.",
        ),
        click.option(
            "--output-tokens", default=DEFAULT_OUTPUT, show_default=True, help="Output length: N, or LOW:HIGH."
        ),
        click.option(
            "--prefix-share", default=0.0, show_default=True, help="Part of each prompt that all share, 0 to 1."
        ),
        click.option("--prefix-groups", default=1, show_default=True, help="Number of different shared prefixes."),
        click.option(
            "--token-range",
            default=":".join(map(str, DEFAULT_TOKEN_RANGE)),
            show_default=True,
            help="Token ids of prompts, LOW:HIGH.",
        ),
        click.option("--prompt-seed", type=int, help="Seed of prompts and arrivals; a new one each run if not given."),
        click.option(
            "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the report here."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def engine_options(function: Function) -> Function:
    """One option per field of EngineConfig that has a flag."""
    hints = typing.get_type_hints(EngineConfig)
    fields = [field for field in dataclasses.fields(EngineConfig) if field.metadata.get("flag") != "(argument)"]
    for field in reversed(fields):
        choices = field.metadata.get("choices")
        flag, hint = flag_name(field.name), hints[field.name]
        plain = PARAMETER_TYPES.get(hint, click.STRING)
        function = click.option(
            field.name,
            f"{flag}/--no-{flag[2:]}" if hint is bool else flag,
            type=click.BOOL if hint is bool else click.Choice(list(choices)) if choices else plain,
            default=field.default,
            show_default=True,
            help=field.metadata["help"],
        )(function)
    return function


@bench.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server, with or without /v1.")
@click.option("--model", help="Model name; the first that the server lists if not given.")
@click.option("--rate", type=float, help="Open loop: requests per second, Poisson; never waits for answers.")
@click.option("--concurrency", type=int, help="Closed loop: requests under way at any time (default: 8).")
@click.option("--requests", "count", default=100, show_default=True, help="Number of measured requests.")
@click.option(
    "--warmup", default=2, show_default=True, help="Unmeasured requests before; they also fill the shared prefix."
)
@click.option(
    "--endpoint",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    show_default=True,
    help="API to call; chat sends text.",
)
@click.option("--text", is_flag=True, help="Prompts of words instead of token ids; lengths then count words.")
@click.option(
    "--extensions/--no-extensions",
    default=True,
    show_default=True,
    help="Send ignore_eos, min_tokens, continuous_usage_stats.",
)
@click.option("--extra-body", default="{}", help="JSON object with more fields for every request.")
@click.option("--temperature", default=0.0, show_default=True, help="Sampling temperature.")
@click.option("--slo-ttft", type=float, help="Objective for goodput: time to first token, seconds.")
@click.option("--slo-tpot", type=float, help="Objective for goodput: mean time per output token, seconds.")
@click.option("--slo-e2e", type=float, help="Objective for goodput: whole answer, seconds.")
@click.option(
    "--timeout", "timeout_s", default=600.0, show_default=True, help="Give a request up after this many seconds."
)
@click.option("--api-key", envvar="PENSTOCK_API_KEY", help="Bearer token (also PENSTOCK_API_KEY).")
@click.option(
    "--response-cache/--no-response-cache",
    default=False,
    show_default=True,
    help="Let a gateway answer from its response cache; otherwise requests say Cache-Control: no-store.",
)
@workload_options
def serve(**values: Any) -> int:
    """Load an OpenAI-compatible server and report TTFT, ITL, TPOT, E2E, throughput and goodput."""
    from penstock.workbench.bench.load import run_async
    from penstock.workbench.bench.report import serve_table

    if values["rate"] is not None and values["concurrency"] is not None:
        raise ConfigError("--rate is an open loop and --concurrency a closed one; give one of them.")
    if values["count"] < 1:
        raise ConfigError("--requests must be at least 1.")
    report = run_async(_measure_server(values))
    _publish(report, serve_table(report), values["json_path"])
    return 0 if report.metrics.completed else 1


@bench.command()
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--requests", "count", default=32, show_default=True, help="Number of requests in the batch.")
@workload_options
@engine_options
def offline(**values: Any) -> None:
    """Measure an engine in this process: prompt tokens per second, output tokens per second."""
    from penstock.workbench.bench.offline import Generator, measure_offline
    from penstock.workbench.bench.report import offline_table

    if values["count"] < 1:
        raise ConfigError("--requests must be at least 1.")
    workload = _workload(values)
    engine = {field.name: values[field.name] for field in dataclasses.fields(EngineConfig)}
    EngineConfig(**engine)

    def load() -> Generator:
        from penstock.llm import LLM

        return LLM(**engine)

    settings = _settings(values, seed=workload.seed)
    report = measure_offline(load, workload, values["count"], settings)
    _publish(report, offline_table(report), values["json_path"])


@bench.command()
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--rounds", default=5, show_default=True, help="Starts of each kind, in turns.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the report here."
)
def startup(model: str, rounds: int, json_path: Path | None) -> None:
    """Time `penstock serve MODEL` until it is ready, against a bare `import torch`."""
    from penstock.workbench.bench.report import startup_table
    from penstock.workbench.bench.server import penstock_command
    from penstock.workbench.bench.startup import measure_startup

    if rounds < 1:
        raise ConfigError("--rounds must be at least 1.")
    report = measure_startup(penstock_command("serve", model), rounds)
    _publish(report, startup_table(report), json_path)


async def _measure_server(values: dict[str, Any]) -> ServeReport:
    from penstock.workbench.bench.arrival import ClosedLoop, OpenLoop
    from penstock.workbench.bench.environment import describe_environment
    from penstock.workbench.bench.load import run_load
    from penstock.workbench.bench.metrics import Objectives, summarize
    from penstock.workbench.bench.report import ServeReport

    environment = describe_environment()
    workload = _workload(values)
    target = await _target(values)
    closed = ClosedLoop(8 if values["concurrency"] is None else values["concurrency"])
    arrival = closed if values["rate"] is None else OpenLoop(values["rate"], workload.seed)
    run = await run_load(target, workload, arrival, values["count"], warmup=values["warmup"])
    load = (
        f"closed loop, {closed.concurrency} users" if arrival is closed else f"open loop, Poisson {values['rate']:g}/s"
    )
    objectives = Objectives(ttft_s=values["slo_ttft"], tpot_s=values["slo_tpot"], e2e_s=values["slo_e2e"])
    metrics = summarize(run.records, objectives)
    return ServeReport(
        environment=environment,
        settings=_settings(values, seed=workload.seed, model=target.model, load=load),
        objectives=objectives,
        metrics=metrics,
        samples={record.error: record.detail for record in run.records if record.error is not None},
        client_cpu_s=run.client_cpu_s,
        client_cpu_share=run.client_cpu_s / metrics.duration_s,
    )


async def _target(values: dict[str, Any]) -> Target:
    from penstock.workbench.bench.client import Client, Target

    try:
        extra_body = msgspec.json.decode(values["extra_body"], type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--extra-body is not a JSON object: {error}.") from error
    target = Target(
        url=values["url"],
        model=values["model"] or "",
        api_key=values["api_key"],
        endpoint=values["endpoint"],
        extensions=values["extensions"],
        temperature=values["temperature"],
        timeout_s=values["timeout_s"],
        extra_body=extra_body,
        response_cache=values["response_cache"],
    )
    if target.model:
        return target
    async with Client(target) as client:
        names = await client.models()
    if not names:
        raise ConfigError(f"{target.url} lists no model; name one with --model.")
    return dataclasses.replace(target, model=names[0])


def _workload(values: dict[str, Any]) -> Workload:
    seed = values["prompt_seed"]
    bounds = values["token_range"].split(":")
    if len(bounds) != 2 or not all(bound.isdecimal() for bound in bounds):
        raise ConfigError(f"--token-range is written LOW:HIGH, not {values['token_range']!r}.")
    return Workload(
        input_lengths=Lengths.parse(values["input_tokens"]),
        output_lengths=Lengths.parse(values["output_tokens"]),
        seed=random.SystemRandom().getrandbits(32) if seed is None else seed,
        prefix_share=values["prefix_share"],
        prefix_groups=values["prefix_groups"],
        token_range=(int(bounds[0]), int(bounds[1])),
        text=values.get("text", False) or values.get("endpoint") == "chat",
    )


def _settings(values: dict[str, Any], *, seed: int, **more: Any) -> dict[str, Any]:
    """What repeats the run: every option, without the key and the report's own path, with the seed that was drawn."""
    hidden = {"api_key", "json_path", "prompt_seed"}
    return {name: value for name, value in values.items() if name not in hidden} | {"prompt_seed": seed} | more


def _publish(report: Report, table: str, json_path: Path | None) -> None:
    from penstock.workbench.bench.report import write_json

    if json_path is not None:
        write_json(report, json_path)
    click.echo(table)
