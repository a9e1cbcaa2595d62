"""Blocks: references, the index of cached blocks, eviction order."""

from __future__ import annotations

import pytest

from penstock.core.errors import IntegrityError
from penstock.engine.block_pool import BlockPool
from penstock.engine.host_tier import HostTier
from penstock.engine.prefix_cache import extend_block_hashes, root_hash


def test_take_and_release_conserve_blocks() -> None:
    pool = BlockPool(4)
    taken = pool.take(3)
    assert sorted(taken) == [0, 1, 2]
    assert pool.num_free == 1
    pool.reference([taken[0]])
    pool.release(taken)
    assert pool.num_free == 3
    pool.check_integrity({taken[0]: 1})


def test_taking_more_than_free_is_an_error_and_changes_nothing() -> None:
    pool = BlockPool(2)
    with pytest.raises(IntegrityError, match="3 blocks wanted, 2 free"):
        pool.take(3)
    pool.check_integrity({})


def test_releasing_too_often_is_an_error() -> None:
    pool = BlockPool(1)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(IntegrityError, match="released more often"):
        pool.release(blocks)


def test_uncached_blocks_are_taken_before_cached_ones_and_those_oldest_first() -> None:
    evicted: list[bytes] = []
    pool = BlockPool(3, lambda block_hash, block_id: evicted.append(block_hash))
    first, second, third = pool.take(3)
    pool.cache(first, b"first")
    pool.cache(second, b"second")
    pool.release([second])
    pool.release([first])
    pool.release([third])
    assert pool.take(1) == [third]
    assert pool.take(1) == [second]
    assert evicted == [b"second"]
    assert pool.find(b"second") is None
    assert pool.find(b"first") == first


def test_a_referenced_cached_block_is_not_evicted() -> None:
    pool = BlockPool(2)
    block, other = pool.take(2)
    pool.cache(block, b"x")
    pool.release([block, other])
    pool.reference([block])
    assert pool.take(1) == [other]
    assert pool.find(b"x") == block


def test_the_first_block_with_a_hash_stays_in_the_index() -> None:
    pool = BlockPool(2)
    first, second = pool.take(2)
    pool.cache(first, b"same")
    pool.cache(second, b"same")
    assert pool.find(b"same") == first
    assert not pool.is_cached(second)
    pool.check_integrity({first: 1, second: 1})


def test_hashes_are_chained_and_salted() -> None:
    root = root_hash("model", "tenant")
    one: list[bytes] = []
    extend_block_hashes(one, root, list(range(10)), 4)
    assert len(one) == 2
    two: list[bytes] = []
    extend_block_hashes(two, root, [9, *range(1, 10)], 4)
    assert one[1] != two[1], "an equal block after an unequal one must have another name"
    extend_block_hashes(one, root, list(range(12)), 4)
    assert len(one) == 3
    other: list[bytes] = []
    extend_block_hashes(other, root_hash("model", "other"), list(range(10)), 4)
    assert not set(one) & set(other)
    assert root_hash("a", "bc") != root_hash("ab", "c")


def test_host_tier_reuses_the_oldest_unpinned_block() -> None:
    tier = HostTier(2)
    first = tier.store(b"1")
    second = tier.store(b"2")
    assert first is not None
    assert second is not None
    assert tier.store(b"1") is None, "already there"
    tier.pin(second)
    assert tier.find(b"1") == first  # now the most recent, but the other is pinned
    assert tier.store(b"3") == first
    tier.pin(first)
    assert tier.store(b"4") is None
    tier.unpin(second)
    assert tier.store(b"4") == second
    tier.check_integrity()
