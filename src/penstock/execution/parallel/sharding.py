"""How much of what belongs to which rank. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """A part of a checkpoint's tensor: rows [rows[0], rows[1]) of its first dimension, and columns of its second; None: all of them."""

    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape, of a tensor of shape `whole`."""
        rows = whole[0] if self.rows is None else self.rows[1] - self.rows[0]
        if len(whole) == 1:
            return (rows,)
        return (rows, whole[1] if self.columns is None else self.columns[1] - self.columns[0], *whole[2:])


WHOLE = Shard()


def even_part(size: int, rank: int, ranks: int, what: str) -> tuple[int, int]:
    """Rank `rank`'s part of `size` things that are divided evenly. Raises ConfigError naming `what` when that is impossible."""
    if size % ranks:
        raise ConfigError(
            f"--tensor-parallel-size {ranks} does not divide the model's {size} {what}; choose one that does."
        )
    share = size // ranks
    return rank * share, (rank + 1) * share


def padded_part(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Rank `rank`'s part of `size` things in equal pieces of ceil(size / ranks), of which the last ones may be shorter or empty."""
    share = -(-size // ranks)
    return min(size, rank * share), min(size, (rank + 1) * share)


def kv_head_part(num_kv_heads: int, rank: int, ranks: int) -> tuple[int, int]:
    """The key and value heads of rank `rank`: an even share, or one that it shares with its neighbours when ranks outnumber heads. Raises
    ConfigError when one number does not divide the other."""
    if ranks <= num_kv_heads:
        return even_part(num_kv_heads, rank, ranks, "key and value heads")
    if ranks % num_kv_heads:
        raise ConfigError(
            f"--tensor-parallel-size {ranks} is no multiple of the model's {num_kv_heads} key and value heads; choose one that is."
        )
    head = rank // (ranks // num_kv_heads)
    return head, head + 1


def local_heads(num_heads: int, num_kv_heads: int, rank: int, ranks: int) -> tuple[int, int]:
    """How many query heads, and how many key and value heads, a rank has. Raises ConfigError when they cannot be divided."""
    first, last = even_part(num_heads, rank, ranks, "attention heads")
    first_kv, last_kv = kv_head_part(num_kv_heads, rank, ranks)
    return last - first, last_kv - first_kv
