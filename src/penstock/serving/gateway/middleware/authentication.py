"""No route without an identity, unless the table of routes says so. What is not known is refused."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import NotFoundError, PermissionDeniedError, RequestError
from penstock.core.log import one_line
from penstock.serving.gateway.accounts.interface import KeyDirectory
from penstock.serving.gateway.context import context_of
from penstock.serving.gateway.errors import render_request_error
from penstock.serving.gateway.identity import ANONYMOUS, Identity
from penstock.serving.gateway.middleware.denial import deny_websocket
from penstock.serving.gateway.security.authenticator import SCRAPER, Authenticator
from penstock.serving.gateway.security.routes import RouteTable

_MAX_PATH_SHOWN = 128


class AuthenticationMiddleware:
    """Sets `context_of(scope).identity`. With `required` False everybody is ANONYMOUS, and only admin routes and a protected /metrics are
    refused. `keys`: says whether admin routes are on; None: they are off."""

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        routes: RouteTable,
        *,
        required: bool,
        keys: KeyDirectory | None = None,
    ) -> None:
        self.app = app
        self._authenticator = authenticator
        self._routes = routes
        self._required = required
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            identity = await self._identify(scope)
        except RequestError as error:
            if scope["type"] == "http":
                await render_request_error(scope, receive, send, error)
            else:
                await deny_websocket(receive, send)
            return
        context_of(scope).identity = identity
        await self.app(scope, receive, send)

    async def _identify(self, scope: Scope) -> Identity:
        need = self._routes.need_of(scope)
        if need == "public":
            return ANONYMOUS
        if need == "metrics":
            return await self._identify_scraper(scope)
        if not self._required:
            if need == "admin":
                raise _not_found(scope)
            return ANONYMOUS
        if need == "open":
            return await self._authenticator.identify(scope) or ANONYMOUS
        identity = await self._authenticator.require(scope)
        if need == "admin":
            if self._keys is None or not await self._keys.any_admin():
                raise _not_found(scope)
            self._require_admin(identity)
        return identity

    async def _identify_scraper(self, scope: Scope) -> Identity:
        """/metrics: the scrape token or an admin; everybody where there is neither authentication nor a token."""
        if not self._required and not self._authenticator.has_scrape_token:
            return ANONYMOUS
        identity = await self._authenticator.require(scope, scrape=True)
        if identity is not SCRAPER:
            self._require_admin(identity)
        return identity

    def _require_admin(self, identity: Identity) -> None:
        if identity.role != "admin":
            self._authenticator.count("role")
            raise PermissionDeniedError("This needs a key with the admin role.")


def _not_found(scope: Scope) -> NotFoundError:
    """As for a route that does not exist."""
    path = one_line(scope["path"][:_MAX_PATH_SHOWN])
    return NotFoundError(f"Unknown route: {scope.get('method', 'GET')} {path}.")
