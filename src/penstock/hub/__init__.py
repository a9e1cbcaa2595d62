"""Where models come from: the embedded one, a folder, or a hub repository that was pulled into a folder before.

Needs only the standard library: `resolve` finds folders, `api` speaks the hub's HTTP, `pull` downloads.
"""

from penstock.hub.resolve import resolve_model, resolve_models

__all__ = ["resolve_model", "resolve_models"]
