"""From what a user calls a model to the folder that holds it. Never touches the network.

A pulled model is a plain folder with a manifest (penstock.json), under

    $PENSTOCK_MODELS or ~/.cache/penstock/models /
        ORG/NAME               the default branch
        ORG/NAME@REVISION      a revision that was asked for by name
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from penstock.core.config import EMBEDDED_DRAFT, EMBEDDED_MODEL, NGRAM, EngineConfig
from penstock.core.errors import ConfigError
from penstock.hub.gguf_folder import find_gguf, gguf_model_folder

MANIFEST = "penstock.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `penstock pull` wrote beside the files: hub name, requested revision, commit, and sizes in bytes by file name."""

    name: str
    revision: str
    commit: str
    files: dict[str, int]


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The folder of a model: the embedded one ('stories') or its draft model ('stories-draft'), an existing folder, a GGUF file, or a hub
    name that was pulled before.

    A GGUF file, also one that is alone in a folder without safetensors files, gets a folder made from it (see gguf_folder). Raises
    ConfigError, one line with the fix, for everything else, and ModelFormatError for a GGUF file that cannot be used.
    """
    folder = Path(model).expanduser()
    if model in (EMBEDDED_MODEL, EMBEDDED_DRAFT) and revision is None:
        return embedded_model_folder(model)
    if folder.is_dir():
        return _checked_folder(folder)
    if folder.is_file():
        if folder.suffix == ".gguf":
            return gguf_model_folder(folder)
        raise ConfigError(
            f"{model} is a file; give a GGUF file, or the folder that holds config.json and the safetensors files."
        )
    if is_hub_name(model):
        pulled = find_pulled(model, revision)
        if pulled is not None:
            return pulled
    raise ConfigError(_not_found_message(model, revision))


def resolve_models(config: EngineConfig) -> tuple[Path, EngineConfig]:
    """The folder of the model, and the settings with the folder of its draft model in place of the name. Raises as `resolve_model`."""
    folder = resolve_model(config.model, config.revision)
    if config.speculative_model in ("", NGRAM):
        return folder, config
    try:
        draft = resolve_model(config.speculative_model)
    except ConfigError as error:
        raise ConfigError(f"--speculative-model: {error}") from error
    return folder, dataclasses.replace(config, speculative_model=str(draft))


def embedded_model_folder(name: str = EMBEDDED_MODEL) -> Path:
    """The packaged folder of the embedded model, or of its draft model. Raises ConfigError when the installation lacks it."""
    folder = Path(__file__).resolve().parents[1] / "assets" / name
    if not (folder / "config.json").is_file():
        raise ConfigError(f"The embedded model is missing from {folder}; reinstall Penstock or give a model folder.")
    return folder


def models_folder() -> Path:
    """Where pulled models live: $PENSTOCK_MODELS, else penstock/models in the user's cache folder."""
    chosen = os.environ.get("PENSTOCK_MODELS")
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "penstock" / "models"


def is_hub_name(model: str) -> bool:
    """True for NAME and ORG/NAME. Such a name is safe as a relative path."""
    return HUB_NAME.fullmatch(model) is not None and ".." not in model


def check_hub_name(name: str, revision: str | None) -> None:
    """Raise ConfigError unless both are well-formed."""
    if not is_hub_name(name):
        raise ConfigError(
            f"{name!r} is not a hub name; it looks like ORG/NAME, such as TinyLlama/TinyLlama-1.1B-Chat-v1.0."
        )
    if revision is not None and (REVISION.fullmatch(revision) is None or ".." in revision):
        raise ConfigError(f"--revision {revision!r} is not a branch, tag or commit.")


def default_folder(name: str, revision: str | None) -> Path:
    """Where `penstock pull` puts a model unless told otherwise."""
    suffix = f"@{revision.replace('/', '--')}" if revision else ""
    return models_folder() / (name + suffix)


def find_pulled(name: str, revision: str | None) -> Path | None:
    """The folder of a completely pulled model. With a revision: one whose recorded revision or commit it is."""
    folder = default_folder(name, None)
    candidates = [folder]
    if revision is not None:
        candidates = [default_folder(name, revision), folder, *sorted(folder.parent.glob(f"{folder.name}@*"))]
    for candidate in candidates:
        manifest = read_manifest(candidate)
        if manifest is None or manifest.name != name:
            continue
        is_commit_prefix = revision is not None and len(revision) >= 7 and manifest.commit.startswith(revision)
        if revision is None or manifest.revision == revision or is_commit_prefix:
            return candidate
    return None


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a pulled folder; None when there is none, it is not readable, or a file of it is missing or cut short."""
    try:
        data = json.loads((folder / MANIFEST).read_text())
        manifest = Manifest(data["name"], data["revision"], data["commit"], dict(data["files"]))
        sizes_match = all((folder / file).stat().st_size == size for file, size in manifest.files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if sizes_match else None


def _checked_folder(folder: Path) -> Path:
    # Repositories of GGUF files often hold a config.json as well, which says next to nothing.
    models = [] if any(folder.glob("*.safetensors")) else find_gguf(folder)
    if len(models) > 1:
        raise ConfigError(
            f"{folder} holds {len(models)} GGUF models; give one of them: {', '.join(str(model) for model in models)}."
        )
    if models:
        return gguf_model_folder(models[0])
    if (folder / "config.json").is_file():
        return folder.resolve()
    nested = sorted(path.parent for path in folder.glob("*/config.json"))
    hint = f"; did you mean {nested[0]}?" if nested else " (a Hugging Face model folder or a GGUF file is needed)."
    raise ConfigError(f"{folder} has no config.json{hint}")


def _not_found_message(model: str, revision: str | None) -> str:
    close = difflib.get_close_matches(model, list(_known_models(model)), n=1, cutoff=0.6)
    suggestion = f" Did you mean {close[0]}?" if close else ""
    if model.endswith(".gguf"):
        return f"There is no file {model}.{suggestion or ' Give a GGUF file or a model folder.'}"
    looks_like_path = model.startswith((".", "/", "~")) or not is_hub_name(model)
    if looks_like_path:
        return (
            f"There is no folder {model}.{suggestion or ' Give a model folder, or a hub name that was pulled before.'}"
        )
    wanted = f"{model} at revision {revision}" if revision else model
    flag = f" --revision {revision}" if revision else ""
    return (
        f"{wanted} is neither a folder nor a pulled model.{suggestion} "
        f"Run `penstock pull {model}{flag}` first, or give a model folder."
    )


def _known_models(model: str) -> Iterator[str]:
    """What a mistyped name may have meant: the embedded model, pulled models, and what lies beside the mistyped path."""
    yield from (EMBEDDED_MODEL, EMBEDDED_DRAFT)
    root = models_folder()
    for manifest in (*root.glob(f"*/{MANIFEST}"), *root.glob(f"*/*/{MANIFEST}")):
        yield str(manifest.parent.relative_to(root)).partition("@")[0]
    parent = Path(model).expanduser().parent
    if parent.is_dir():
        prefix = model[: len(model) - len(Path(model).name)] if model.rstrip("/") == model else ""
        for config in parent.glob("*/config.json"):
            yield prefix + config.parent.name
        for file in parent.glob("*.gguf"):
            yield prefix + file.name
