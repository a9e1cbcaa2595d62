"""What is known of one HTTP request while it passes through the middleware; lives in the ASGI scope."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.types import Scope

from penstock.serving.gateway.identity import ANONYMOUS, Identity

_KEY = "penstock.context"


@dataclass(slots=True)
class RequestContext:
    """`request_id`: the client's label or ours. `identity`: who asks (authentication replaces it). `response_headers` are added to the head
    of the response, errors included. `route`: the template of the route, for logs and metrics; None while it is unknown."""

    request_id: str
    identity: Identity = ANONYMOUS
    response_headers: dict[bytes, bytes] = field(default_factory=dict)
    route: str | None = None


def set_context(scope: Scope, context: RequestContext) -> None:
    """Attach the context to a request."""
    scope[_KEY] = context


def context_of(scope: Scope) -> RequestContext:
    """The context of a request; one with an empty id where no middleware made one (tests of single parts)."""
    context: RequestContext | None = scope.get(_KEY)
    if context is None:
        context = scope[_KEY] = RequestContext("")
    return context
