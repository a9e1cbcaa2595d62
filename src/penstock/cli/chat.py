"""`penstock chat`: a conversation in the terminal, with a server (--url) or with a model in this process."""

from __future__ import annotations

from typing import Any

import click

from penstock.cli.options import SettingsCommand, config_from, with_settings
from penstock.cli.sampling import sampling_fields, sampling_params, with_sampling
from penstock.core.config import EngineConfig
from penstock.core.errors import ConfigError


@click.command(cls=SettingsCommand)
@click.argument("model", required=False)
@click.option(
    "--url", help="Address of an OpenAI-compatible server, such as http://localhost:8000; MODEL then is a name there."
)
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Key for the server (also OPENAI_API_KEY).")
@click.option("--system", help="System message that opens the conversation.")
@with_sampling(max_tokens=1024, temperature=0.7)
# --seed means sampling here; the engine's seed of dummy weights stays at its default.
@with_settings(EngineConfig, without=frozenset({"seed"}))
def chat(model: str | None, url: str | None, api_key: str | None, system: str | None, **values: Any) -> None:
    """Chat with MODEL in this process ('stories', the embedded model, if not given), or with a server at --url.

    Commands in the conversation: /help /reset /system TEXT /exit. Ctrl-C stops the answer, twice exits. When stdin is not a
    terminal, each line is a message.
    """
    from penstock.cli.chat_backends import ChatBackend, EngineBackend, HttpBackend
    from penstock.cli.chat_loop import Conversation, LoopThread

    fields = sampling_fields(values)
    sampling_params(fields)
    backend: ChatBackend
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url must start with http:// or https://, such as http://{url}.")
        from penstock.cli.packages import require

        require("server", "httpx")
        backend = HttpBackend(url, model, api_key, fields)
    else:
        from penstock.cli.pull import ensure_model

        config = config_from(EngineConfig, {**values, **({"model": model} if model else {})})
        ensure_model(config.model, config.revision)
        backend = EngineBackend(config, sampling_params(fields))
    with LoopThread() as loop:
        Conversation(loop, backend, system).run()
