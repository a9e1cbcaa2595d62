"""Settings of the gateway: who may ask, how much, what is remembered, when the answer is no. Same rules as in `config`."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.config import check_at_least, check_choices, flag_name, setting
from penstock.core.errors import ConfigError

AUTH_METHODS = ("keys", "jwt")
JWT_ALGORITHMS = ("HS256", "RS256", "ES256")


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Settings of identity, limits, response cache and admission."""

    # ---- identity ----
    auth: str = setting(
        "auto",
        "Who may use the API: 'none', 'keys', 'jwt' or 'keys,jwt'. 'auto': none on a loopback address; elsewhere keys, and the server "
        "does not start before there is one.",
    )
    admin_key_file: str | None = setting(
        None, "File with a secret that becomes the first admin key at start (a container's secret)."
    )
    open_routes: str = setting("", "Paths that need no identity, separated by commas, such as /v1/models,/version.")
    metrics_token_file: str | None = setting(None, "File with the token that /metrics takes as bearer token.")
    metrics_port: int = setting(0, "Serve /metrics without identity on this port too; 0: no.")
    metrics_host: str = setting("127.0.0.1", "Address of --metrics-port.")
    jwt_algorithm: str = setting("RS256", "The only algorithm that a JWT may be signed with.", choices=JWT_ALGORITHMS)
    jwt_secret_file: str | None = setting(None, "File with the shared secret of HS256 (at least 32 bytes).")
    jwt_jwks: str | None = setting(None, "JWKS with the public keys: a file or an https URL of yours.")
    jwt_issuer: str | None = setting(None, "Required `iss` of a JWT.")
    jwt_audience: str | None = setting(None, "Required `aud` of a JWT.")
    jwt_leeway_s: float = setting(30.0, "Clock difference that `exp` and `nbf` tolerate, in seconds.")
    jwt_tenant_claim: str = setting("tenant", "Claim that names the tenant; dots reach into objects.")
    jwt_role_claim: str = setting("role", "Claim that says user or admin; without it the role is user.")
    jwt_limits_claim: str = setting("limits", "Claim with an object of rpm, tpm and concurrency.")
    allowed_hosts: str = setting(
        "",
        "Host names that requests may carry, separated by commas; empty: loopback names while there is no authentication, "
        "else any.",
    )
    cors_origins: str = setting("", "Origins that browsers may call from, separated by commas; empty: none.")
    # ---- stores ----
    database_url: str | None = setting(
        None, "Accounts and usage: sqlite:///FILE or postgresql://…; a SQLite file in the data folder if not given."
    )
    redis_url: str | None = setting(None, "Redis for limits, response cache and single flight: redis://HOST:PORT/0.")
    redis_timeout_s: float = setting(0.25, "Longest wait for an answer of Redis.")
    redis_limits_failure: str = setting(
        "local",
        "Limits while Redis is away: 'local' counts in this process, 'open' lets all pass, 'closed' answers 503.",
        choices=("local", "open", "closed"),
    )
    price_table: str | None = setting(None, "TOML file with prices per million tokens and model; without it cost is 0.")
    usage_spool_mib: float = setting(64.0, "Largest file in MiB that keeps usage while the database is away.")
    # ---- limits ----
    default_rpm: int = setting(0, "Requests per minute of a key that has no limit of its own; 0: no limit.")
    default_tpm: int = setting(0, "Tokens per minute of a key that has no limit of its own; 0: no limit.")
    default_concurrency: int = setting(0, "Concurrent requests of a key that has no limit of its own; 0: no limit.")
    tokens_counted: str = setting(
        "both", "Which tokens count against tokens per minute.", choices=("both", "input", "output")
    )
    reserve_output_tokens: int = setting(
        256, "Output tokens reserved at admission for a request without max_tokens; the rest is charged at the end."
    )
    # ---- response cache ----
    response_cache: str = setting(
        "auto",
        "Where answers are kept: 'memory', 'redis', 'off'. 'auto': Redis where --redis-url is given, else memory.",
        choices=("auto", "off", "memory", "redis"),
    )
    response_cache_mib: float = setting(256.0, "Size in MiB of the response cache in memory.")
    response_cache_ttl_s: float = setting(3600.0, "How long an answer is kept, in seconds.")
    response_cache_shared: bool = setting(
        False, "Answer tenants from each other's cached answers. Leaks through timing what others asked."
    )
    # ---- admission ----
    max_inflight_requests: int = setting(
        0, "Generations that the gateway lets into one engine at once; 0: four times --max-num-seqs."
    )
    max_inflight_tokens: int = setting(
        0, "Prompt and output tokens reserved in one engine at once; 0: four times its KV cache."
    )
    max_queue_wait_s: float = setting(
        30.0, "Longest wait in the engine before the first step; then the request ends with 503."
    )
    max_connections: int = setting(4096, "Open connections per gateway process; more get 503 and are closed.")
    read_timeout_s: float = setting(
        30.0, "A client has this many seconds for the head of a request and again for its body."
    )
    drain_linger_s: float = setting(
        0.0, "On SIGTERM, accept requests for so many seconds more with readiness off (load balancers lag)."
    )
    gateway_workers: int = setting(1, "Gateway processes in front of the engine.")
    # ---- proxies and TLS ----
    root_path: str = setting("", "Path prefix that a proxy strips.")
    forwarded_allow_ips: str = setting(
        "", "Addresses or networks of proxies whose X-Forwarded-For and -Proto are believed, separated by commas."
    )
    ssl_certfile: str | None = setting(None, "TLS certificate chain (PEM).")
    ssl_keyfile: str | None = setting(None, "TLS private key (PEM).")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.auth not in ("auto", "none") and not set(self.auth.split(",")) <= set(AUTH_METHODS):
            raise ConfigError(f"--auth must be none, keys, jwt or keys,jwt, not {self.auth!r}.")
        for name in (
            "default_rpm",
            "default_tpm",
            "default_concurrency",
            "max_inflight_requests",
            "max_inflight_tokens",
        ):
            check_at_least(self, name, 0)
        for name in ("drain_linger_s", "jwt_leeway_s", "response_cache_mib", "usage_spool_mib"):
            check_at_least(self, name, 0)
        for name in ("reserve_output_tokens", "max_connections", "gateway_workers"):
            check_at_least(self, name, 1)
        for name in ("redis_timeout_s", "response_cache_ttl_s", "max_queue_wait_s", "read_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{flag_name(name)} must be above 0, not {getattr(self, name)}.")
        if not 0 <= self.metrics_port <= 65535:
            raise ConfigError(f"--metrics-port must be between 0 and 65535, not {self.metrics_port}.")
        if self.response_cache == "redis" and not self.redis_url:
            raise ConfigError("--response-cache redis needs --redis-url.")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("--ssl-certfile and --ssl-keyfile go together.")
        if self.root_path and not (self.root_path.startswith("/") and not self.root_path.endswith("/")):
            raise ConfigError("--root-path must begin with / and not end with it.")

    @property
    def auth_methods(self) -> tuple[str, ...]:
        """("keys", "jwt") or a part of it; empty for 'none' and while 'auto' is not resolved."""
        return () if self.auth in ("auto", "none") else tuple(m for m in AUTH_METHODS if m in self.auth.split(","))
