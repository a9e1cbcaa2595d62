"""Request and response bodies as types."""
