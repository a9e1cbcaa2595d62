"""POST /v1/completions and /v1/chat/completions: from a checked body to an answer, whole or streamed.

body ─▶ Call ─▶ response cache ─▶ limits ─▶ admission ─▶ EngineClient ─▶ Renderer ─▶ JSON or events
                    └─ hit ─▶ limits ─────────────────────────────────▶ Renderer
"""
