"""docs/adding-a-model.md shows code that exists."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import penstock.execution.models

REPOSITORY = Path(__file__).parents[3]
MODELS = Path(penstock.execution.models.__path__[0])


def test_code_on_the_page_is_the_code_in_the_file() -> None:
    page = (REPOSITORY / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(snippets) == 1
    assert textwrap.dedent(snippets[0]).strip() in (MODELS / "qwen2.py").read_text(encoding="utf-8")


def test_files_on_the_page_exist() -> None:
    page = (REPOSITORY / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:models|layers)/\w+\.py)`", page))
    assert len(names) >= 8
    assert [name for name in names if not (MODELS.parent / name).is_file()] == []
