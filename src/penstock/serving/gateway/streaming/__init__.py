"""From deltas of an engine to bytes on a connection: merging, server-sent events, disconnects."""
