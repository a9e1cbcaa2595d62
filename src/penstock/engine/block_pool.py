"""Fixed-size KV blocks on the device: reference counts, the index of cached blocks, and least-recently-used eviction.

    free (ref_count 0)                                      used (ref_count > 0)
    ┌ taken first ──────────────────────── taken last ┐     ┌──────────────────────────┐
    │ not cached │ cached, least recently used … most │     │ referenced by requests,   │
    └────────────┴────────────────────────────────────┘     │ cached or not             │
                                                            └──────────────────────────┘

A cached block stays in the index when nobody references it, until it is taken for something else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from penstock.core.errors import IntegrityError

BlockHash = bytes


class BlockPool:
    """`num_blocks` blocks with ids 0 … num_blocks - 1. `on_evict(hash, block_id)` is told when a cached block is taken."""

    def __init__(self, num_blocks: int, on_evict: Callable[[BlockHash, int], None] | None = None) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._ref_counts = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._block_of)

    def find(self, block_hash: BlockHash) -> int | None:
        """The block that holds these tokens, or None. Valid until the next `take`, unless it is referenced."""
        return self._block_of.get(block_hash)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def take(self, count: int) -> list[int]:
        """`count` free blocks with one reference each, evicting cached ones as needed.

        Raises IntegrityError when there are not enough: callers check `num_free` first.
        """
        if count > len(self._free):
            raise IntegrityError(f"{count} blocks wanted, {len(self._free)} free")
        taken = []
        for _ in range(count):
            block_id, _ = self._free.popitem(last=False)
            block_hash = self._hashes[block_id]
            if block_hash is not None:
                self.forget(block_id)
                if self._on_evict is not None:
                    self._on_evict(block_hash, block_id)
            self._ref_counts[block_id] = 1
            taken.append(block_id)
        return taken

    def reference(self, block_ids: Iterable[int]) -> None:
        """One more reference to each block, free or used."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """One reference less to each block. Give the end of a sequence first: what is released first is evicted first."""
        for block_id in block_ids:
            count = self._ref_counts[block_id] - 1
            if count < 0:
                raise IntegrityError(f"block {block_id} released more often than referenced")
            self._ref_counts[block_id] = count
            if count == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def cache(self, block_id: int, block_hash: BlockHash) -> None:
        """Put a full, computed block into the index. When another block already holds these tokens, that one stays."""
        if self._hashes[block_id] is None and block_hash not in self._block_of:
            self._hashes[block_id] = block_hash
            self._block_of[block_hash] = block_id

    def is_cached(self, block_id: int) -> bool:
        return self._hashes[block_id] is not None

    def forget(self, block_id: int) -> None:
        """Take a block out of the index."""
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            self._hashes[block_id] = None
            del self._block_of[block_hash]

    def check_integrity(self, expected_ref_counts: dict[int, int]) -> None:
        """Raise IntegrityError unless free + used = total, references are as expected, and the index is a bijection."""
        for block_id, count in enumerate(self._ref_counts):
            if count != expected_ref_counts.get(block_id, 0):
                raise IntegrityError(
                    f"block {block_id} has {count} references, {expected_ref_counts.get(block_id, 0)} are known"
                )
            if (count == 0) != (block_id in self._free):
                raise IntegrityError(f"block {block_id} with {count} references is on the wrong side of the free list")
        indexed = {block_id: block_hash for block_hash, block_id in self._block_of.items()}
        hashed = {block_id: block_hash for block_id, block_hash in enumerate(self._hashes) if block_hash is not None}
        if indexed != hashed:
            raise IntegrityError(f"index of {len(indexed)} cached blocks does not match {len(hashed)} hashed blocks")
