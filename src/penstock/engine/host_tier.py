"""Evicted KV blocks in host memory: which host block holds which tokens, least recently used out first."""

from __future__ import annotations

from collections import Counter, OrderedDict

from penstock.core.errors import IntegrityError
from penstock.engine.block_pool import BlockHash


class HostTier:
    """Bookkeeping of `num_blocks` host blocks; the executor owns their memory.

    A block that a step in flight reads from is pinned and is not given to other tokens meanwhile.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._block_of: OrderedDict[BlockHash, int] = OrderedDict()
        self._unused = list(range(num_blocks - 1, -1, -1))
        self._pins: Counter[int] = Counter()

    @property
    def num_used(self) -> int:
        return len(self._block_of)

    def find(self, block_hash: BlockHash) -> int | None:
        """The host block with these tokens, now the most recently used, or None."""
        block_id = self._block_of.get(block_hash)
        if block_id is not None:
            self._block_of.move_to_end(block_hash)
        return block_id

    def store(self, block_hash: BlockHash) -> int | None:
        """A host block to write these tokens to; None when they are here already or every block is pinned."""
        if self.find(block_hash) is not None:
            return None
        if self._unused:
            block_id = self._unused.pop()
        else:
            victim = next((h for h, b in self._block_of.items() if not self._pins[b]), None)
            if victim is None:
                return None
            block_id = self._block_of.pop(victim)
        self._block_of[block_hash] = block_id
        return block_id

    def drop(self, block_ids: list[int]) -> None:
        """Forget what these host blocks hold (their copy failed)."""
        dropped = set(block_ids)
        for block_hash in [h for h, b in self._block_of.items() if b in dropped]:
            self._unused.append(self._block_of.pop(block_hash))

    def pin(self, block_id: int) -> None:
        self._pins[block_id] += 1

    def unpin(self, block_id: int) -> None:
        self._pins[block_id] -= 1
        if self._pins[block_id] <= 0:
            del self._pins[block_id]

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every host block is either unused or holds exactly one block of tokens."""
        if sorted([*self._unused, *self._block_of.values()]) != list(range(self.num_blocks)):
            raise IntegrityError("host blocks are lost or doubled")
