"""What tests build on: fakes, tiny checkpoints, builders. Not imported by the server."""
