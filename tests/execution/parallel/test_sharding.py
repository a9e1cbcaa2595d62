"""Who gets how much: shares cover everything once, and impossible ones say what to change."""

from __future__ import annotations

import pytest

from penstock.core.errors import ConfigError
from penstock.execution.parallel.groups import WHOLE_MODEL, PipelineStage
from penstock.execution.parallel.sharding import (
    WHOLE,
    Shard,
    even_part,
    kv_head_part,
    local_heads,
    padded_part,
)


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"),
    [(8, 2, [4, 4]), (7, 2, [4, 3]), (7, 3, [2, 3, 2]), (8, 3, [3, 3, 2]), (11, 4, [3, 3, 3, 2]), (2, 2, [1, 1])],
)
def test_layers_of_stages(layers: int, stages: int, sizes: list[int]) -> None:
    ranges = [PipelineStage(index, stages).layers(layers) for index in range(stages)]
    assert [len(part) for part in ranges] == sizes
    assert [layer for part in ranges for layer in part] == list(range(layers))
    for index, part in enumerate(ranges):
        stage = PipelineStage(index, stages)
        assert [stage.local_layer(layer, layers) for layer in part] == list(range(len(part)))


def test_the_whole_model_is_one_stage() -> None:
    stage = WHOLE_MODEL.stage
    assert (stage.is_first, stage.is_last, stage.layers(5)) == (True, True, range(5))
    assert WHOLE_MODEL.tensor.collectives is None


@pytest.mark.parametrize(("size", "ranks"), [(12, 4), (273, 2), (273, 4), (5, 4)])
def test_padded_parts_cover_everything(size: int, ranks: int) -> None:
    parts = [padded_part(size, rank, ranks) for rank in range(ranks)]
    assert [number for start, stop in parts for number in range(start, stop)] == list(range(size))
    assert all(stop - start <= -(-size // ranks) for start, stop in parts)


def test_key_and_value_heads() -> None:
    assert [kv_head_part(4, rank, 2) for rank in range(2)] == [(0, 2), (2, 4)]
    assert [kv_head_part(2, rank, 4) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert local_heads(32, 4, 1, 2) == (16, 2)
    assert local_heads(32, 4, 7, 8) == (4, 1)
    # A rank's query heads belong to its key and value heads.
    for heads, kv_heads, ranks in ((32, 4, 2), (32, 4, 8), (12, 2, 4), (8, 1, 8)):
        for rank in range(ranks):
            queries, keys = range(*even_part(heads, rank, ranks, "heads")), range(*kv_head_part(kv_heads, rank, ranks))
            assert {query // (heads // kv_heads) for query in queries} == set(keys)


def test_shares_that_do_not_come_out_even() -> None:
    with pytest.raises(ConfigError, match="--tensor-parallel-size 3 does not divide the model's 8 attention heads"):
        even_part(8, 0, 3, "attention heads")
    with pytest.raises(
        ConfigError, match="--tensor-parallel-size 3 is no multiple of the model's 2 key and value heads"
    ):
        kv_head_part(2, 0, 3)


def test_shapes_of_shards() -> None:
    assert WHOLE.shape((6, 4)) == (6, 4)
    assert Shard(rows=(2, 5)).shape((6, 4)) == (3, 4)
    assert Shard(columns=(1, 3)).shape((6, 4)) == (6, 2)
    assert Shard(rows=(2, 5)).shape((6,)) == (3,)
    assert Shard(rows=(0, 1), columns=(0, 2)).shape((6, 4, 7)) == (1, 2, 7)
