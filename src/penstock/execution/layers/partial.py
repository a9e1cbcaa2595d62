"""A numbered list of modules of which this process has only some: the layers of its pipeline stage, the experts of its rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn


class PartialModuleList(nn.ModuleDict):
    """Modules under their numbers in the whole model, which are their names in checkpoints.

    Iterating gives numbers as text, like any ModuleDict; `present` gives them as integers.
    """

    def __init__(self, present: Iterable[int], make: Callable[[int], nn.Module]) -> None:
        self.present = tuple(present)
        super().__init__({str(index): make(index) for index in self.present})
