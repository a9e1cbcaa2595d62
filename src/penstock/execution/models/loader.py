"""Fills a model with the weights of a folder of safetensors files.

Every tensor of the checkpoint has exactly one place and every place gets exactly one tensor; anything else is an error that names
the tensor and the file. Files are memory-mapped: a tensor's bytes are read once, into their place, converted on the way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from penstock.core.errors import ModelFormatError
from penstock.execution.layers.weight import Weight
from penstock.execution.models.decoder import CausalLM
from penstock.execution.models.fields import Fields
from penstock.execution.models.safetensors_file import TensorInfo, read_header

_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# Tensors of old checkpoints that hold nothing which config.json does not say.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)

# A parameter and the part of it that one tensor of the checkpoint fills.
_Place = tuple[str, str | None]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`: those of the index file, or the one and only. Raises ModelFormatError."""
    if (folder / _INDEX_FILE).is_file():
        return sorted({folder / name for name in _weight_map(folder).values()})
    if (folder / _SINGLE_FILE).is_file():
        return [folder / _SINGLE_FILE]
    if found := sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES):
        raise ModelFormatError(
            f"{folder} has weights only as {found[0]}; that format can run code when it is opened. "
            "Convert the model to safetensors (transformers: save_pretrained) or get it in that format."
        )
    raise ModelFormatError(f"{folder} has no weights: neither {_SINGLE_FILE} nor {_INDEX_FILE} exists.")


def load_weights(model: CausalLM, files: list[Path], *, progress: bool) -> None:
    """Copy all tensors of `files` into the parameters of `model`. Raises ModelFormatError."""
    headers = {file: read_header(file) for file in files}
    tensors: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, info in header.items():
            if name in tensors:
                raise ModelFormatError(f"{file}: tensor {name!r} is in {tensors[name].file.name} as well.")
            tensors[name] = info
    places = _assign_places(model, tensors)
    parameters = _parameters(model)
    total = sum(info.nbytes for info in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:
        for file, header in headers.items():
            try:
                opened: Any = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ModelFormatError(f"{file} is no safetensors file: {error}.") from error
            with opened:
                for name, info in header.items():
                    if name in places:
                        parameter, shard = places[name]
                        parameters[parameter].target(shard).copy_(opened.get_tensor(name))
                    bar.update(info.nbytes)


def _assign_places(model: CausalLM, tensors: dict[str, TensorInfo]) -> dict[str, _Place]:
    """Which place each tensor fills. Raises ModelFormatError for unexpected, mis-shaped and missing tensors."""
    parameters = _parameters(model)
    missing: dict[_Place, None] = {
        (name, shard): None for name, parameter in parameters.items() for shard in parameter.shards or (None,)
    }
    places = {}
    for name, info in tensors.items():
        if name.endswith(_IGNORED_SUFFIXES) or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        place = _place(model, name)
        if place not in missing:
            raise ModelFormatError(
                f"{info.file}: unexpected tensor {name!r}; a {model.config.model_type} model has none."
            )
        target = parameters[place[0]].target(place[1])
        if tuple(target.shape) != info.shape:
            raise ModelFormatError(
                f"{info.file}: tensor {name!r} has shape {list(info.shape)}, config.json asks for {list(target.shape)}."
            )
        del missing[place]
        places[name] = place
    if missing:
        names = [_checkpoint_name(model, place) for place in missing]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        where = next(iter(tensors.values())).file.parent if tensors else "the checkpoint"
        raise ModelFormatError(f"{where}: missing tensors: {listed}.")
    return places


def _place(model: CausalLM, name: str) -> _Place:
    """model.layers.0.self_attn.q_proj.weight → (model.layers.0.self_attn.qkv_proj.weight, q)."""
    parts = name.split(".")
    if len(parts) >= 2 and parts[-2] in model.packed_modules:
        parts[-2], shard = model.packed_modules[parts[-2]]
        return ".".join(parts), shard
    return name, None


def _checkpoint_name(model: CausalLM, place: _Place) -> str:
    """The inverse of `_place`."""
    parts = place[0].split(".")
    for module, packed in model.packed_modules.items():
        if packed == (parts[-2], place[1]):
            parts[-2] = module
    return ".".join(parts)


def _parameters(model: CausalLM) -> dict[str, Weight]:
    parameters = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, Weight):
            raise TypeError(
                f"parameter {name} is a {type(parameter).__name__}; layers make their parameters with Weight"
            )
        parameters[name] = parameter
    return parameters


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor → file name, from the index file; the files are in `folder` itself and exist."""
    index = Fields.from_file(folder / _INDEX_FILE)
    weight_map = index.string_map("weight_map")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            index.fail("weight_map", f"{name!r} is no safetensors file of this folder")
        if not (folder / name).is_file():
            raise ModelFormatError(f"{folder / name} does not exist, but {_INDEX_FILE} lists it; download it again.")
    return weight_map
