"""`penstock pull NAME`: a hub model as a plain folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from penstock.cli.options import SettingsCommand
from penstock.core.errors import ConfigError


@click.command(cls=SettingsCommand)
@click.argument("name")
@click.option("--revision", help="Branch, tag or commit; the default branch if not given.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    help="Folder to put the model in; the models folder if not given.",
)
@click.option("--token", help="Access token for private and gated models (also HF_TOKEN).")
def pull(name: str, revision: str | None, directory: Path | None, token: str | None) -> None:
    """Download the model NAME (ORG/NAME on the Hugging Face hub) into a plain folder.

    The folder holds safetensors weights, tokenizer, configuration and chat template, records the exact commit, works
    offline and can be copied to another machine. An interrupted download continues when the command runs again.

    HF_ENDPOINT names another hub, PENSTOCK_MODELS another models folder.
    """
    from penstock.hub.api import HubClient
    from penstock.hub.pull import pull as pull_model
    from penstock.hub.resolve import check_hub_name, default_folder

    check_hub_name(name, revision)
    destination = directory.expanduser().absolute() if directory is not None else default_folder(name, revision)
    with ProgressBars() as bars:
        manifest = pull_model(HubClient(token=token), name, destination, revision=revision, progress=bars.update)
    total = sum(manifest.files.values())
    click.echo(f"{name} at commit {manifest.commit}: {len(manifest.files)} files, {total / 1e6:,.1f} MB")
    click.echo(f"  {destination}")
    served = name if directory is None else destination
    click.echo(f"  penstock serve {served}{f' --revision {revision}' if revision and directory is None else ''}")


def ensure_model(model: str, revision: str | None) -> Path:
    """The folder of a model, like `hub.resolve_model`; ORG/NAME that is not here yet is pulled from the hub first.

    A name whose first part is a folder here is a mistyped path, not a hub name; HF_HUB_OFFLINE=1 forbids the pull. Raises
    ConfigError, HubError.
    """
    from penstock.hub import resolve_model
    from penstock.hub.api import HubClient, HubConnectionError
    from penstock.hub.pull import pull as pull_model
    from penstock.hub.resolve import default_folder, is_hub_name

    try:
        return resolve_model(model, revision)
    except ConfigError as missing:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        if offline or "/" not in model or not is_hub_name(model) or Path(model).parent.is_dir():
            raise
        click.echo(f"{model} is not here yet: pulling it from the hub.", err=True)
        try:
            with ProgressBars() as bars:
                pull_model(HubClient(), model, default_folder(model, revision), revision=revision, progress=bars.update)
        except HubConnectionError as error:
            raise ConfigError(f"{missing} Pulling it now failed: {error}") from error
    return resolve_model(model, revision)


class ProgressBars:
    """One bar per file on stderr; none when stderr is not a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._file = ""

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def update(self, file: str, done: int, size: int) -> None:
        """`done` of `size` bytes of `file` are here."""
        from tqdm import tqdm

        if file != self._file:
            self._close()
            self._file = file
            self._bar = tqdm(
                total=size,
                initial=done,
                desc=file,
                unit="B",
                unit_scale=True,
                unit_divisor=1000,
                disable=None,
                leave=True,
            )
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
