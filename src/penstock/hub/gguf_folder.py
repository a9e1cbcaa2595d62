"""From a GGUF file to a model folder that the rest of Penstock reads like any other.

    $PENSTOCK_CACHE_DIR/gguf, else $XDG_CACHE_HOME/penstock/gguf, else ~/.cache/penstock/gguf /
        NAME-KEY/
            config.json  generation_config.json  tokenizer.json  tokenizer_config.json  (the chat template is in the last)
            model.gguf → the file, or the first part of a split model

A folder takes about as many megabytes as the tokenizer and none of the weights. KEY is made of path, size, time of change and beginning of
every part, so a changed file gets a new folder. Folders appear complete or not at all; the least recently used ones are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from penstock.core.errors import ConfigError, ModelFormatError
from penstock.core.gguf import part_paths, read_gguf_parts
from penstock.hub.gguf_config import model_config
from penstock.hub.gguf_tokenizer import tokenizer_files

WEIGHTS_FILE = "model.gguf"
MAX_FOLDERS = 16

# To be raised when the same file gives other contents than before.
_FORMAT = 1
_KEY_BYTES = 2**16
_OWN_NAME = re.compile(r".+-[0-9a-f]{16}")
_TEMPORARY_PREFIX = ".new-"
_TEMPORARY_AGE_S = 3600.0


def gguf_model_folder(file: Path) -> Path:
    """The folder for `file`, made now or before. Raises ModelFormatError for the file, ConfigError when the folder cannot be written."""
    # Links are left alone: the names of what they point to may say nothing, and the parts of a split model are found by name.
    parts = part_paths(Path(os.path.abspath(file)))
    cache = gguf_cache_folder()
    folder = cache / f"{_stem(parts[0])}-{_key(parts)}"
    if not folder.is_dir():
        contents = _contents(parts[0])
        try:
            _publish(folder, contents, parts[0])
        except OSError as error:
            raise ConfigError(
                f"{file} needs a folder of its own in {cache}, which cannot be written ({error.strerror or error}); "
                "set PENSTOCK_CACHE_DIR to a folder that can."
            ) from error
    _mark_used(folder)
    return folder


def gguf_cache_folder() -> Path:
    """Where the folders live; see the head of this file."""
    if chosen := os.environ.get("PENSTOCK_CACHE_DIR"):
        return Path(chosen).expanduser() / "gguf"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "penstock" / "gguf"


def find_gguf(folder: Path) -> list[Path]:
    """The GGUF models in a folder, each once: of a split model the first part."""
    files = sorted(path for path in folder.glob("*.gguf") if path.is_file())
    return [path for path in files if part_paths(path)[0] == path or part_paths(path)[0] not in files]


def _stem(file: Path) -> str:
    """The model's part of the file name, as far as it can be part of a folder's."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", file.stem)[:80] or "model"


def _key(parts: list[Path]) -> str:
    digest = hashlib.sha256(f"format {_FORMAT}".encode())
    for part in parts:
        try:
            status = part.stat()
            with part.open("rb") as opened:
                head = opened.read(_KEY_BYTES)
        except OSError as error:
            raise ModelFormatError(f"{part} cannot be read: {error.strerror or error}.") from error
        digest.update(f"\0{part}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
        digest.update(head)
    return digest.hexdigest()[:16]


def _contents(file: Path) -> dict[str, dict[str, Any]]:
    """The folder's JSON files by name."""
    parts = read_gguf_parts(file)
    tokenizer = tokenizer_files(parts[0])
    config = model_config(parts, tokenizer.eos_token_ids)
    generation: dict[str, Any] = {"eos_token_id": list(tokenizer.eos_token_ids)}
    if tokenizer.bos_token_id is not None:
        config["bos_token_id"] = generation["bos_token_id"] = tokenizer.bos_token_id
    contents = {"config.json": config, "generation_config.json": generation}
    if tokenizer.tokenizer is not None and tokenizer.tokenizer_config is not None:
        contents |= {"tokenizer.json": tokenizer.tokenizer, "tokenizer_config.json": tokenizer.tokenizer_config}
    return contents


def _publish(folder: Path, contents: dict[str, dict[str, Any]], file: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=folder.parent))
    try:
        for name, content in contents.items():
            (temporary / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        (temporary / WEIGHTS_FILE).symlink_to(file)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process was faster; what it made is the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _remove_old(folder)


def _mark_used(folder: Path) -> None:
    """A cache on a read-only disk still serves; then nothing is removed from it either."""
    if os.access(folder, os.W_OK):
        os.utime(folder)


def _remove_old(newest: Path) -> None:
    """Keep the most recently used folders, `newest` among them, and remove what a killed process left half-made."""
    used: list[tuple[float, Path]] = []
    for path in newest.parent.iterdir():
        try:
            changed = path.stat().st_mtime
        except FileNotFoundError:
            # Another process removes as well.
            continue
        if path.name.startswith(_TEMPORARY_PREFIX):
            if changed < time.time() - _TEMPORARY_AGE_S:
                shutil.rmtree(path, ignore_errors=True)
        elif _OWN_NAME.fullmatch(path.name) and path != newest:
            used.append((changed, path))
    for _, path in sorted(used, reverse=True)[MAX_FOLDERS - 1 :]:
        shutil.rmtree(path, ignore_errors=True)
