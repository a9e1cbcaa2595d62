"""What the routes share: the engines by model name, the settings, the recorder, and whether the server is going down."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from penstock.core.config import ServerConfig
from penstock.core.errors import InvalidRequestError, NotFoundError, OverloadedError
from penstock.serving.frontend.client import EngineClient
from penstock.telemetry.recorder import Recorder

_MAX_NAME_SHOWN = 128


@dataclass
class Gateway:
    """One per application. `draining`: no new generation is accepted and readiness is off. `in_flight`: generations now."""

    clients: Mapping[str, EngineClient]
    config: ServerConfig
    recorder: Recorder
    version: str
    started_at: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    in_flight: int = 0

    def resolve(self, model: str | None) -> tuple[str, EngineClient]:
        """Name and client of a model; None means the only one. Raises NotFoundError, InvalidRequestError."""
        if model is None:
            if len(self.clients) != 1:
                raise InvalidRequestError(
                    "Several models are served; name one.", param="model", code="missing_required_parameter"
                )
            model = next(iter(self.clients))
        client = self.clients.get(model)
        if client is None:
            raise NotFoundError(
                f"The model '{model[:_MAX_NAME_SHOWN]}' does not exist.", param="model", code="model_not_found"
            )
        return model, client

    def check_accepting(self) -> None:
        """Raise OverloadedError while the server goes down."""
        if self.draining:
            raise OverloadedError("The server is shutting down.", retry_after_s=1.0)

    def unready(self) -> str:
        """Why the server is not ready; empty when it is."""
        if self.draining:
            return "The server is shutting down."
        for name, client in self.clients.items():
            health = client.health()
            if not health.ready:
                return f"The model '{name}' is not ready: {health.reason or 'no reason given'}."
        return ""
