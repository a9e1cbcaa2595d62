"""Names for full blocks of tokens: parent-chained hashes, so that equal names mean equal prefixes.

    root = H(model, salt)        h0 = H(root, tokens[0:B])        h1 = H(h0, tokens[B:2B])        …

SHA-256, because a client chooses the tokens: a weaker hash would let one tenant forge the name of another's block. The salt in
the root (tenant, adapter, the client's own) separates caches, so that timing tells nothing across tenants.
"""

from __future__ import annotations

import hashlib
from array import array

from penstock.engine.block_pool import BlockHash


def root_hash(*salts: str) -> BlockHash:
    """The parent of a sequence's first block. Each salt is length-prefixed, so that ("a", "b") and ("ab", "") differ."""
    digest = hashlib.sha256()
    for salt in salts:
        encoded = salt.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def extend_block_hashes(hashes: list[BlockHash], root: BlockHash, token_ids: list[int], block_size: int) -> None:
    """Append the hashes of the full blocks of `token_ids` that `hashes` does not cover yet."""
    num_full = len(token_ids) // block_size
    if len(hashes) >= num_full:
        return
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_size, num_full * block_size, block_size):
        parent = hashlib.sha256(parent + array("i", token_ids[start : start + block_size]).tobytes()).digest()
        hashes.append(parent)
