"""Plain ASGI middleware, outermost first: request id, access log and metrics, error boundary, body limit."""
