"""The people's wing: text, HTTP, replicas. Never imports torch."""
