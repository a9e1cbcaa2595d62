"""Plain ASGI middleware, outermost first: request id, access log and metrics, error boundary, forwarded addresses, host check, CORS,
authentication, gate (early refusals), body limit."""
