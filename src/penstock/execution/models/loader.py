"""Moves the weights of a source into a model, one tensor at a time.

Every tensor of the source has exactly one place and every place gets exactly one tensor; anything else is an error that names the tensor
and the file, before anything is read. A layer has no memory for its weight before the first of its tensors comes, and when the last one
has come it keeps them in the layout of its kernel; so memory holds the finished layers, and the tensors of the one at hand.

A process that holds a part of the model reads that part of each tensor, and of tensors that it has no place for nothing. Its numbers are
those that the whole model has there, also when weights are rounded on the way: one scale for a whole row is found from the whole row, so
that --quantization int8 and fp8 read all of the weights that are split along their rows.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from penstock.core.errors import ConfigError, ModelFormatError
from penstock.execution.kernels.linear import NativeLinear
from penstock.execution.kernels.quantized import CompactWeight, StoredWeight
from penstock.execution.layers.weight import Slot, SlotRole, Weight, WeightHolder, as_float
from penstock.execution.models.decoder import CausalLM
from penstock.execution.models.precision import PrecisionCensus
from penstock.execution.models.source import RowSource, WeightSource
from penstock.execution.parallel.sharding import Shard
from penstock.execution.quantization.part import cut_weight
from penstock.execution.quantization.rounding import WeightRounding

# Tensors of old checkpoints that hold nothing which config.json does not say.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)

# Weights that are read at a time to be rounded.
_ROUNDED_AT_ONCE = 1 << 20

# Bytes that are read before freed memory is given back.
_READ_BETWEEN_TRIMS = 1 << 24

# A module's parameter and the part of it that one tensor of the checkpoint fills.
_Place = tuple[str, str | None]


@dataclass(frozen=True)
class Rounding:
    """Schemes for the float weights of a role; roles that are not there stay as they are. setting: what asked for it, for messages."""

    schemes: Mapping[SlotRole, WeightRounding]
    setting: str


@dataclass(frozen=True)
class LoadOptions:
    """What happens to weights on their way into the model.

    rounding: round float weights; a weight that is quantised already is a ConfigError then. dequantize: turn quantised weights back into
    floats. widened: see PrecisionCensus. packed: weights of whole layers, by module name, that were packed before and need not be read.
    progress: show a bar.
    """

    rounding: Rounding | None = None
    dequantize: bool = False
    widened: str | None = None
    packed: Mapping[str, NativeLinear] = field(default_factory=dict)
    progress: bool = False


def load_weights(
    model: CausalLM, source: WeightSource, options: LoadOptions, whole: CausalLM | None = None
) -> PrecisionCensus:
    """Fill all layers of `model`. Returns what they were filled with. Raises ModelFormatError and ConfigError.

    whole: the whole model where `model` is a part of it; it is not filled, and says what tensors there are and what they are for.
    """
    slots = model_slots(model)
    whole_slots = slots if whole is None else model_slots(whole)
    places = {name: place for name, place in _assign_places(model, source, whole_slots).items() if place in slots}
    census = PrecisionCensus(options.widened)
    holders = _holders(model)
    roles = {name.removesuffix(".weight"): slot.role for (name, _), slot in whole_slots.items()}
    for module_name, weight in options.packed.items():
        holders[module_name].take_native(weight)
        for segment in weight.segments:
            census.add_packed(roles[module_name], segment)
    names = [name for name in places if places[name][0].rpartition(".")[0] not in options.packed]
    # The largest go first: while they are in memory twice, nothing else is there.
    names.sort(key=lambda name: slots[places[name]].role not in ("head", "table"))
    sizes = {name: _bytes_to_read(source, name, slots[places[name]]) for name in names}
    total, read = sum(sizes.values()), 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not options.progress) as bar:
        for name in names:
            # A table that is the output head's as well is rounded like it, also where the head is in another process.
            slot = replace(slots[places[name]], role=whole_slots[places[name]].role)
            value = _read(source, name, slot, options)
            census.add(slot.role, value)
            slot.fill(value)
            del value
            read += sizes[name]
            bar.update(sizes[name])
            if read >= _READ_BETWEEN_TRIMS:
                trim_memory()
                read = 0
    trim_memory()
    return census


def trim_memory() -> None:
    """Give memory that was freed back to the system, where the C library can; it otherwise keeps what lies between finished weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def model_slots(model: CausalLM) -> dict[_Place, Slot]:
    """All places of the model, in the order of its layers."""
    slots: dict[_Place, Slot] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        if isinstance(module, WeightHolder):
            slots |= {(f"{prefix}{name}", shard): slot for (name, shard), slot in module.slots().items()}
        for name, parameter in module.named_parameters(module_name, recurse=False):
            slots[name, None] = _parameter_slot(name, parameter)
    return slots


def native_weights(model: CausalLM) -> dict[str, NativeLinear]:
    """The packed weights of all layers that have some, by module name."""
    weights = {name: holder.native_weight for name, holder in _holders(model).items()}
    return {name: weight for name, weight in weights.items() if weight is not None}


def packed_weights_fit(model: CausalLM, weights: Mapping[str, NativeLinear]) -> bool:
    """Whether packed weights belong to layers of this model and have their sizes."""
    holders = _holders(model)
    for name, weight in weights.items():
        slots = holders[name].slots() if name in holders else {}
        shapes = [slot.shard.shape(slot.shape) for slot in slots.values() if len(slot.shape) == 2]
        if not shapes or (sum(rows for rows, _ in shapes), shapes[0][1]) != (weight.out_features, weight.in_features):
            return False
    return True


def checkpoint_shapes(model: CausalLM) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that a checkpoint of the model has."""
    return {_checkpoint_name(model, place): slot.shape for place, slot in model_slots(model).items()}


def count_parameters(model: CausalLM) -> int:
    """As in the checkpoint; tied weights count once."""
    return sum(math.prod(slot.shape) for slot in model_slots(model).values())


def _read(source: WeightSource, name: str, slot: Slot, options: LoadOptions) -> StoredWeight:
    scheme = None if options.rounding is None else options.rounding.schemes.get(slot.role)
    if options.rounding is not None and scheme is not None:
        try:
            return _rounded(source, name, slot, scheme, options.rounding.setting)
        except ValueError as error:
            raise ModelFormatError(f"{source.where(name)}: {error}.") from error
    value = source.read(name, slot.shard)
    return as_float(value) if options.dequantize else value


def _rounded(source: WeightSource, name: str, slot: Slot, scheme: WeightRounding, setting: str) -> StoredWeight:
    rows, width = slot.shard.rows or (0, slot.shape[0]), slot.shape[1]
    columns = slot.shard.columns or (0, width)
    part_scheme = scheme.of_part(width, columns)
    if part_scheme is None:
        value = _rounded_rows(source, name, Shard(rows), width, scheme, setting)
        return cut_weight(value, (0, rows[1] - rows[0]), columns, source.where(name))
    return _rounded_rows(source, name, Shard(rows, slot.shard.columns), columns[1] - columns[0], part_scheme, setting)


def _rounded_rows(
    source: WeightSource, name: str, shard: Shard, width: int, scheme: WeightRounding, setting: str
) -> CompactWeight:
    """The shard, whose rows are given and `width` numbers long."""
    first, last = shard.rows or (0, 0)
    rounded = scheme.begin(last - first, width)
    if isinstance(source, RowSource):
        step = max(1, _ROUNDED_AT_ONCE // width)
        for start in range(first, last, step):
            rounded.put(start - first, source.read_rows(name, start, min(last, start + step), shard.columns))
        return rounded.tensor()
    value = source.read(name, shard)
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"{setting} rounds plain weights, but {source.where(name)} is quantised already; drop {setting}."
        )
    rounded.put(0, value)
    return rounded.tensor()


def _bytes_to_read(source: WeightSource, name: str, slot: Slot) -> int:
    """About what this process reads of a tensor."""
    share = math.prod(slot.shard.shape(slot.shape)), max(1, math.prod(slot.shape))
    return source.nbytes(name) * share[0] // share[1]


def _assign_places(model: CausalLM, source: WeightSource, slots: Mapping[_Place, Slot]) -> dict[str, _Place]:
    """Which place each tensor fills. Raises ModelFormatError for unexpected, mis-shaped and missing tensors."""
    missing = dict.fromkeys(slots)
    places: dict[str, _Place] = {}
    for name in source.names():
        if name.endswith(_IGNORED_SUFFIXES) or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        place = _place(model, name)
        if place not in missing:
            if _says_nothing(source, name, place, slots):
                continue
            where = source.where(name).replace(": tensor ", ": unexpected tensor ")
            raise ModelFormatError(f"{where}; a {model.config.model_type} model has none.")
        if slots[place].shape != source.shape(name):
            raise ModelFormatError(
                f"{source.where(name)} has shape {list(source.shape(name))}, config.json asks for {list(slots[place].shape)}."
            )
        del missing[place]
        places[name] = place
    if missing:
        names = [_checkpoint_name(model, place) for place in missing]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        where = source.where(next(iter(places))).partition(": tensor")[0] if places else "the checkpoint"
        raise ModelFormatError(f"{where}: missing tensors: {listed}.")
    return places


def _says_nothing(source: WeightSource, name: str, place: _Place, slots: Mapping[_Place, Slot]) -> bool:
    """Whether this is the bias of a layer that has none, and zero: GPTQ tools give every layer a bias."""
    parameter, shard = place
    weight = slots.get((f"{parameter.removesuffix('.bias')}.weight", shard))
    if not parameter.endswith(".bias") or weight is None or source.shape(name) != weight.shape[:1]:
        return False
    value = source.read(name)
    return isinstance(value, Tensor) and not bool(torch.any(value != 0))


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


def _holders(model: CausalLM) -> dict[str, WeightHolder]:
    return {name: module for name, module in model.named_modules() if isinstance(module, WeightHolder)}


def _parameter_slot(name: str, parameter: nn.Parameter) -> Slot:
    if not isinstance(parameter, Weight):
        raise TypeError(f"parameter {name} is a {type(parameter).__name__}; layers make their parameters with Weight")
    return parameter.slot()
