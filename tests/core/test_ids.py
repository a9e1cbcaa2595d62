"""Random ids."""

from __future__ import annotations

import re

from penstock.core.ids import RandomIds


def test_ids_never_repeat_and_have_one_shape() -> None:
    sources = RandomIds(), RandomIds()
    ids = [source.take() for source in sources for _ in range(1000)]
    assert len(set(ids)) == 2000
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)
