"""The HTTP side: routes, streaming, middleware. Knows engines only as EngineClient; never imports torch."""
