"""Download a model from the hub into a plain folder that works offline and can be copied.

    DEST.partial-COMMIT/   file, file, file.part (grows; a later run continues it)
            │ every size and checksum is right, manifest written
            ▼ rename
    DEST/                  files and penstock.json

DEST appears only when it is complete. Nothing in it links to a cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from penstock.core.errors import ConfigError, ModelFormatError
from penstock.hub.api import HubClient, HubConnectionError, HubError, RemoteFile, Repository
from penstock.hub.resolve import MANIFEST, Manifest, check_hub_name, read_manifest

INDEX = "model.safetensors.index.json"
SMALL_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "chat_template.json",
        "LICENSE",
        "LICENSE.txt",
        "README.md",
    }
)
CHUNK_BYTES = 1 << 20
SPARE_DISK_BYTES = 64 << 20
ATTEMPTS = 5

# Called with (file name, bytes of it that are here now, its size).
Progress = Callable[[str, int, int], None]


def pull(
    client: HubClient,
    name: str,
    destination: Path,
    *,
    revision: str | None = None,
    progress: Progress = lambda _file, _done, _size: None,
    retry_wait_s: float = 2.0,
) -> Manifest:
    """Download `name` into the folder `destination` and return its manifest. Does nothing when it is there already.

    Raises ConfigError (wrong name, occupied folder, disk too small), HubError (the hub refused or is not reachable) and
    ModelFormatError (the repository has no safetensors weights).
    """
    check_hub_name(name, revision)
    present = _check_destination(destination, name)
    if present is not None and revision is not None and present.commit == revision:
        return present
    repository = client.repository(name, revision or "main")
    if present is not None and present.commit == repository.commit:
        return present
    partial = destination.with_name(f"{destination.name}.partial-{repository.commit[:12]}")
    partial.mkdir(parents=True, exist_ok=True)
    with _only_one(partial):
        files = _choose_files(client, repository, partial, retry_wait_s)
        _check_disk(partial, files)
        for file in files:
            _download(client, repository, file, partial, progress, retry_wait_s)
        manifest = Manifest(name, revision or "main", repository.commit, {file.path: file.size for file in files})
        _write_manifest(partial, manifest)
        _publish(partial, destination)
    return manifest


def _check_destination(destination: Path, name: str) -> Manifest | None:
    """The manifest of a complete pull that is there already. Raises ConfigError for a folder that is something else."""
    if destination.is_dir() and not any(destination.iterdir()):
        return None
    if not destination.exists():
        return None
    if destination.is_dir() and (destination / MANIFEST).is_file():
        present = read_manifest(destination)
        if present is None or present.name == name:
            return present
    raise ConfigError(f"{destination} exists and is not a pulled {name}; choose another folder with --dir.")


def _choose_files(client: HubClient, repository: Repository, partial: Path, retry_wait_s: float) -> list[RemoteFile]:
    """Configuration, tokenizer, template and one set of safetensors weights: those that the index names, if there is an index."""
    top_level = {file.path: file for file in repository.files if "/" not in file.path}
    weights = [path for path in top_level if path.endswith(".safetensors")]
    small = [file for path, file in top_level.items() if path in SMALL_FILES]
    if "config.json" not in top_level:
        raise ModelFormatError(f"{repository.name} has no config.json, so it is not a model that Penstock can serve.")
    if not weights:
        raise ModelFormatError(
            f"{repository.name} has no safetensors weights at its top level; look for a converted repository of the model."
        )
    if INDEX in top_level:
        _download(client, repository, top_level[INDEX], partial, lambda _file, _done, _size: None, retry_wait_s)
        small.append(top_level[INDEX])
        weights = _indexed_weights(partial / INDEX, repository.name)
        absent = [path for path in weights if path not in top_level]
        if absent:
            raise ModelFormatError(f"{repository.name} lacks {absent[0]}, which its {INDEX} names.")
    elif "model.safetensors" in top_level:
        weights = ["model.safetensors"]
    return [*small, *(top_level[path] for path in sorted(weights))]


def _indexed_weights(index: Path, name: str) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelFormatError(f"{INDEX} of {name} is not a weight index.") from error


def _check_disk(partial: Path, files: list[RemoteFile]) -> None:
    here = sum(path.stat().st_size for path in partial.iterdir() if path.name != MANIFEST)
    needed = sum(file.size for file in files) - here
    free = shutil.disk_usage(partial).free
    if needed + SPARE_DISK_BYTES > free:
        raise ConfigError(
            f"The download needs {needed / 1e9:.1f} GB, {partial.parent} has {free / 1e9:.1f} GB free; "
            "free some space or choose another disk with --dir."
        )


def _download(
    client: HubClient, repository: Repository, file: RemoteFile, partial: Path, progress: Progress, retry_wait_s: float
) -> None:
    """Bring one file, continuing what an earlier attempt left; retries broken connections."""
    target = partial / file.path
    part = partial / f"{file.path}.part"
    if target.is_file() and target.stat().st_size == file.size:
        progress(file.path, file.size, file.size)
        return
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _append(client, repository, file, part, progress)
            break
        except HubConnectionError:
            got_further = part.exists() and part.stat().st_size > before
            failures = 1 if got_further else failures + 1
            if failures >= ATTEMPTS:
                raise
            time.sleep(retry_wait_s * failures)
    _check_contents(part, file)
    part.replace(target)


def _append(client: HubClient, repository: Repository, file: RemoteFile, part: Path, progress: Progress) -> None:
    """Add the missing rest of `file` to `part`. Raises HubConnectionError when the connection breaks."""
    offset = part.stat().st_size if part.exists() else 0
    if offset > file.size:
        part.unlink()
        offset = 0
    if offset == file.size and part.exists():
        return
    with client.open_file(repository.name, repository.commit, file.path, offset) as response:
        if offset and response.status != 206:
            offset = 0
        with part.open("ab" if offset else "wb") as output:
            progress(file.path, offset, file.size)
            for chunk in _chunks(response, client.endpoint):
                _write(output.write, chunk, part)
                offset += len(chunk)
                progress(file.path, offset, file.size)
    if offset < file.size:
        raise HubConnectionError(
            f"{client.endpoint} closed the connection during {file.path}; run the same command to continue."
        )


def _chunks(response: http.client.HTTPResponse, endpoint: str) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise HubConnectionError(
                f"The connection to {endpoint} broke ({error}); run the same command to continue."
            ) from error
        if not chunk:
            return
        yield chunk


def _write(write: Callable[[bytes], int], chunk: bytes, part: Path) -> None:
    try:
        write(chunk)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"The disk of {part.parent} is full; free some space and run the same command to continue."
            ) from error
        raise


def _check_contents(part: Path, file: RemoteFile) -> None:
    """Size and, where the hub tells it, checksum; a wrong file is removed so that the next run fetches it again."""
    size = part.stat().st_size
    digest = None
    if size == file.size and file.sha256:
        with part.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if size != file.size or digest != file.sha256:
        part.unlink()
        raise HubError(f"{file.path} arrived damaged and was removed; run the same command to fetch it again.")


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    data = {"name": manifest.name, "revision": manifest.revision, "commit": manifest.commit, "files": manifest.files}
    with (folder / MANIFEST).open("w") as stream:
        json.dump(data, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())


def _publish(partial: Path, destination: Path) -> None:
    """Put the complete folder in its place; an older pull there goes away afterwards."""
    for leftover in partial.glob("*.part"):
        leftover.unlink()
    if not destination.exists():
        partial.rename(destination)
        return
    old = destination.with_name(f"{destination.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    destination.rename(old)
    partial.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Two downloads into one folder would write over each other."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"Another penstock pull is downloading into {folder}; wait for it.") from error
        yield
    finally:
        os.close(descriptor)
