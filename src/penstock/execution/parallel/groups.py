"""Which part of a model this process holds, and how it talks to the processes that hold the others.

    rank = stage * tensor_parallel_size + rank within the stage

                    tensor rank 0    tensor rank 1
    stage 0             0                1          embedding, first layers
    stage 1             2                3          last layers, norm, output head

Layers know `TensorParallel` and nothing else: a layer asks for its share, computes with it, and adds up or gathers what the others have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class Collectives(Protocol):
    """Operations that all ranks of a group take part in, in the same order. They raise RuntimeError when a rank is gone."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by the sum over all ranks; the same bits on every rank."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors [..., N] of all ranks side by side, in the order of ranks: [..., size * N]."""
        ...


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among those that share every layer. `collectives` is None only when size is 1."""

    rank: int = 0
    size: int = 1
    collectives: Collectives | None = None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """`tensor`, summed over all ranks in place."""
        if self.collectives is not None:
            self.collectives.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See Collectives; `tensor` itself when there is one rank."""
        return tensor if self.collectives is None else self.collectives.all_gather(tensor)


@dataclass(frozen=True)
class PipelineStage:
    """Which of the consecutive parts of the layers this process has."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, num_layers: int) -> range:
        """The layers of this stage. What does not divide evenly goes to the stages in the middle first, then to the first: the ends have
        embedding and output head to do as well."""
        share, extra = divmod(num_layers, self.count)
        # Stages by who gets one layer more: from the one before the last backwards, then the last.
        order = [*range(self.count - 2, -1, -1), self.count - 1]
        sizes = [share + (stage in order[:extra]) for stage in range(self.count)]
        start = sum(sizes[: self.index])
        return range(start, start + sizes[self.index])

    def local_layer(self, layer: int, num_layers: int) -> int:
        """The place of a layer among those of this stage, where its KV cache is."""
        return layer - self.layers(num_layers).start


@dataclass(frozen=True)
class ModelPart:
    """What of a model a process holds."""

    tensor: TensorParallel = field(default_factory=TensorParallel)
    stage: PipelineStage = field(default_factory=PipelineStage)


WHOLE_MODEL = ModelPart()
