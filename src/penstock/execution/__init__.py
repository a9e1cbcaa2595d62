"""The tensor wing: models, attention, sampling and the runner that executes steps. Everything here may import torch."""
