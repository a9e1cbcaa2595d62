"""What the routes share: the engines by model name, the settings, the services, and whether the server is going down."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from penstock.core.config import ServerConfig
from penstock.core.errors import InvalidRequestError, NotFoundError, OverloadedError
from penstock.core.gateway_config import GatewayConfig
from penstock.serving.frontend.client import EngineClient
from penstock.serving.gateway.identity import ANONYMOUS, Identity
from penstock.serving.gateway.services import Services
from penstock.telemetry.recorder import Recorder

_MAX_NAME_SHOWN = 128


@dataclass
class Gateway:
    """One per application.

    `draining`: readiness is off and no new generation is accepted. `lingering`: readiness is off already, and generations are still
    accepted. `in_flight`: generations now. `preparing`: requests between their head and their admission. `scrape`: the metrics
    of all gateway processes; None: this one is alone.
    """

    clients: Mapping[str, EngineClient]
    config: ServerConfig
    settings: GatewayConfig
    recorder: Recorder
    services: Services
    version: str
    started_at: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    lingering: bool = False
    in_flight: int = 0
    scrape: Callable[[], Awaitable[Recorder]] | None = None
    preparing: int = 0

    def resolve(self, model: str | None, identity: Identity = ANONYMOUS) -> tuple[str, EngineClient]:
        """Name and client of a model; None means the only one. A model that the identity may not use does not exist for it.

        Raises NotFoundError, InvalidRequestError.
        """
        if model is None:
            names = list(self.visible(identity))
            if len(names) != 1:
                raise InvalidRequestError(
                    "Several models are served; name one.", param="model", code="missing_required_parameter"
                )
            model = names[0]
        client = self.clients.get(model)
        if client is None or not identity.may_use(model):
            raise NotFoundError(
                f"The model '{model[:_MAX_NAME_SHOWN]}' does not exist or may not be used with this key.",
                param="model",
                code="model_not_found",
            )
        return model, client

    def visible(self, identity: Identity) -> Iterable[str]:
        """The models that an identity may use."""
        return (name for name in self.clients if identity.may_use(name))

    def check_accepting(self) -> None:
        """Raise OverloadedError while the server goes down."""
        if self.draining:
            raise OverloadedError("The server is shutting down.", retry_after_s=1.0)

    def unready(self) -> str:
        """Why the server is not ready; empty when it is."""
        if self.draining or self.lingering:
            return "The server is shutting down."
        for name, client in self.clients.items():
            health = client.health()
            if not health.ready:
                return f"The model '{name}' is not ready: {health.reason or 'no reason given'}."
        return ""
