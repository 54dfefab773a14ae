"""Where initial weights come from: a Hugging Face folder or the model's own random initialisation.

Both are range readers (`ds_recipes/ranges.py`), so an engine fills its shards from them as it does from a checkpoint,
each rank on its own and without communication.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ds_recipes.errors import InputError
from ds_recipes.models.skeleton import (
    holds_sentinel,
    initialiser,
    left_out_by_transformers,
    parameter_shapes,
    saved_buffers,
    tied_names,
)
from ds_recipes.ranges import COPY_BYTES, NONE_MISSED, HfFolder

KEPT_ELEMENTS = 1 << 18
"""Made tensors up to this size are kept: engines come back for the small ones (norms, biases) in a second pass."""

MOST_SHOWN = 5  # names of a list in a message
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class InitialWeights:
    """What every source of initial weights says of itself: names, shapes, and that there is no optimizer state."""

    optimizer_step = 0
    missed_steps = NONE_MISSED

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def has(self, kind: str) -> bool:
        return kind == "fp32"

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        return {}


class MadeWeights(InitialWeights):
    """A range reader over tensors that are made when they are first asked for, a group at a time.

    Only the newest group and the small tensors are held, so memory is bounded by the largest group.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        make_group: Callable[[str], dict[str, torch.Tensor]],
        buffers: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(shapes)
        self._make_group = make_group
        self._buffers = buffers or {}
        self._newest: dict[str, torch.Tensor] = {}
        self._small: dict[str, torch.Tensor] = {}

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        return self._buffers

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened parameter into `out`."""
        full = self._small.get(name)
        if full is None:
            full = self._newest.get(name)
        if full is None:
            self._newest = self._make_group(name)
            self._small |= {key: value for key, value in self._newest.items() if value.numel() <= KEPT_ELEMENTS}
            full = self._newest[name]
        out.copy_(full.reshape(-1)[start : start + out.numel()])


def random_weights(skeleton: PreTrainedModel, seed: int, device: torch.device) -> MadeWeights:
    """The model's own initialisation, equal for any number of ranks: each unit's seed comes from its name.

    A unit is one decoder layer, or one module outside of the layers. Values are drawn in float32 on `device`; a GPU's
    numbers differ from a CPU's. What the model leaves to its modules' constructors, which set nothing in a model without
    storage, they set here.

    Raises:
        InputError: a parameter gets no value from either, or a saved buffer none.
    """
    _refuse_unset(skeleton, never_set(skeleton))
    unit_of = _units(skeleton)
    buffers = saved_buffers(skeleton)
    unset = [name for name, buffer in buffers.items() if holds_sentinel(buffer)]
    if unset:
        raise InputError(
            f"{type(skeleton).__name__} does not set its buffer {unset[0]} in _init_weights, so it has no first value. "
            "Start from a folder with weights (--model_name)."
        )

    def make_group(name: str) -> dict[str, torch.Tensor]:
        prefix = unit_of[name]
        unit = skeleton.get_submodule(prefix)
        seed_of_unit = int.from_bytes(hashlib.blake2b(f"{seed}:{prefix}".encode(), digest_size=7).digest(), "little")
        with (
            _real_parameters(unit, device),
            torch.no_grad(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(seed_of_unit)
            unit.apply(initialiser(skeleton, prefix))
            for module in unit.modules():
                if any(_has_nan(parameter) for parameter in module.parameters(recurse=False)) and as_constructed(
                    module
                ):
                    initialiser(skeleton, prefix)(module)
            made = {f"{prefix}.{key}" if prefix else key: value.detach() for key, value in unit.named_parameters()}
        _refuse_unset(skeleton, [key for key, value in made.items() if _has_nan(value)])
        return made

    return MadeWeights(parameter_shapes(skeleton), make_group, buffers)


def never_set(model: PreTrainedModel) -> list[str]:
    """Names of parameters that neither `_init_weights` nor their module's constructor would set; no storage is needed."""
    written = _Written()
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            with torch.no_grad(), written:
                initialiser(model, path)(module)
    names = []
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if not written.has(parameter) and not can_construct(module):
                names.append(f"{path}.{key}" if path else key)
    return names


def can_construct(module: nn.Module) -> bool:
    """True if `as_constructed` can set the module's parameters."""
    return isinstance(module, Conv1D) or hasattr(module, "reset_parameters")


def as_constructed(module: nn.Module) -> bool:
    """Set the module's parameters as its constructor does; False if it does that by no method of its own."""
    reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if isinstance(module, Conv1D):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif reset is not None:
        reset()
    return can_construct(module)


class _Written(TorchDispatchMode):
    """Notes the storages that operations write into; those of meta tensors count too, and cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: set[int] = set()

    def has(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                self._storages.add(value.untyped_storage()._cdata)
        return func(*args, **(kwargs or {}))


def _has_nan(tensor: torch.Tensor) -> bool:
    return bool(tensor.isnan().any())


def _refuse_unset(model: PreTrainedModel, names: Sequence[str]) -> None:
    if names:
        raise InputError(
            f"{type(model).__name__} does not set {len(names)} of its parameters in _init_weights (transformers "
            f"{transformers.__version__}), so they cannot be drawn shard by shard:\n{shortened(names)}\nMake a model with "
            "random weights once, AutoModelForCausalLM.from_config(...).save_pretrained(FOLDER), and start from it: --model_name."
        )


def _units(model: PreTrainedModel) -> dict[str, str]:
    """Map each parameter's name to the path of the unit that is initialised with it."""
    layers = {
        f"{path}.{index}"
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index in range(len(module))
    }
    outermost = {path for path in layers if not any(path.startswith(f"{other}.") for other in layers if other != path)}
    units = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        prefixes = [".".join(parts[:length]) for length in range(1, len(parts))]
        units[name] = next((prefix for prefix in prefixes if prefix in outermost), ".".join(parts[:-1]))
    return units


@contextmanager
def _real_parameters(unit: nn.Module, device: torch.device) -> Iterator[None]:
    """Give a unit's meta parameters float32 storage full of NaN; back to meta afterwards, what was taken out stays alive."""
    homes = [
        (module, key, parameter)
        for module in unit.modules()
        for key, parameter in module.named_parameters(recurse=False)
    ]
    shapes = {id(parameter): parameter.shape for _, _, parameter in homes}
    real = {
        key: nn.Parameter(torch.full(shape, torch.nan, dtype=torch.float32, device=device))
        for key, shape in shapes.items()
    }
    try:
        for module, key, parameter in homes:
            module._parameters[key] = real[id(parameter)]  # a shared one stays shared
        yield
    finally:
        for module, key, parameter in homes:
            module._parameters[key] = parameter


def _no_bar(_make: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What transformers takes instead of its own progress bar."""
    return logging.EmptyTqdm(*given, **named)


class FolderWeights(InitialWeights):
    """A range reader over a Hugging Face safetensors folder.

    A parameter that lies in the folder with its shape is read straight from the file. One that transformers
    renames keeps that way under its file name; one that it fuses or transposes goes through transformers' own
    conversion, one parameter at a time.

    `unused` are the names in the files that nothing in the model takes; `left_out` those that transformers leaves out by
    rules of its own, such as layers that only predict further tokens.
    """

    def __init__(self, skeleton: PreTrainedModel, folder: Path) -> None:
        """Find every parameter.

        Raises:
            InputError: one is missing, has another shape or is no floating-point number; two tensors claim the same one.
        """
        super().__init__(parameter_shapes(skeleton))
        self._folder = folder
        self.skeleton = skeleton
        self._conversions = get_model_conversion_mapping(skeleton)
        self._files = HfFolder(folder)
        self._refuse_doubles()
        claims, converted, others = self._claims()
        self.unused, self.left_out = _apart(others, left_out_by_transformers(skeleton))
        self._plain, self._ties = self._choose(claims)
        self._sources = self._targets(converted)
        self._refuse_missing()
        self._buffers = saved_buffers(skeleton)
        self._buffer_files = {name: claims[name][0] for name in self._buffers if name in claims}
        self._check_buffers()
        self._refuse_codes()
        for name, file_name in self._plain.items():
            self._refuse_shape(file_name, self._files.shape(file_name), self._shapes[name])
        if converted:
            self._check_conversions(converted)
        self._made = MadeWeights({name: self._shapes[name] for name in self._sources}, self._convert)

    def _claims(self) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, str]]:
        """What each name in the files stands for, by transformers' rules and in its order.

        First: file names by the model's name for them. Second: the same of tensors that are converted, by their first
        target. Third: what stands for nothing in the model, file name -> the name that it would have there.
        """
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        prefix, meta = self.skeleton.base_model_prefix, self.skeleton.state_dict()
        claims: dict[str, list[str]] = {}
        converted: dict[str, list[str]] = {}
        others: dict[str, str] = {}
        for file_name in sorted(self._files.names, key=dot_natural_key):
            renamed, pattern = rename_source_key(file_name, renamings, converters, prefix, meta)
            if renamed not in meta and file_name in meta:
                renamed, pattern = rename_source_key(file_name, [], [], prefix, meta)
            if renamed not in meta:
                others[file_name] = renamed
            else:
                (claims if pattern is None else converted).setdefault(renamed, []).append(file_name)
        return claims, converted, others

    def _refuse_doubles(self) -> None:
        """A tensor that two shards have is one that some program saved twice; which of two values is right nobody knows."""
        for name, others in self._files.doubles.items():
            kept = self._files.file_of[name]
            for other in others:
                if not torch.equal(kept.tensor(name), other.tensor(name)):
                    raise InputError(
                        f"{self._folder}: {kept.path.name} and {other.path.name} both hold {name}, with different values. Save "
                        "the model once more, or remove the file that does not belong there."
                    )

    def _choose(self, claims: Mapping[str, list[str]]) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
        """The tensor of each parameter, and of each tied one that has several: further name -> both of their file names."""
        aliases = tied_names(self.skeleton)
        plain: dict[str, str] = {}
        ties: dict[str, tuple[str, str]] = {}
        for name in sorted(claims, key=lambda name: name in aliases):
            first, *more = claims[name]
            differing = next((other for other in more if not self._equal(first, other)), None)
            if differing is not None:
                raise InputError(
                    f"{self._folder}: {first} and {differing} are both {name} of the model, with different values. Remove the "
                    "one that does not belong to it."
                )
            canonical = aliases.get(name, name)
            if canonical in plain:
                ties[name] = (plain[canonical], first)
            elif canonical in self._shapes:
                plain[canonical] = first
        return plain, ties

    def differing_ties(self) -> list[str]:
        """Names of parameters that config.json ties to another while the files have different values for the two."""
        return [name for name, (one, other) in self._ties.items() if not self._equal(one, other)]

    def _equal(self, one: str, other: str) -> bool:
        if self._files.shape(one) != self._files.shape(other):
            return False
        numel = prod(self._files.shape(one))
        for start in range(0, numel, COPY_BYTES // 4):
            pair = torch.empty((2, min(COPY_BYTES // 4, numel - start)))
            self._files.read_into(one, start, pair[0])
            self._files.read_into(other, start, pair[1])
            if not torch.equal(pair[0], pair[1]):
                return False
        return True

    def _refuse_missing(self) -> None:
        missing = [name for name in self._shapes if name not in self._plain and name not in self._sources]
        if not missing:
            return
        lines = shortened(missing)
        head = self.skeleton.get_output_embeddings()
        without_head = head is not None and {id(self.skeleton.get_parameter(name)) for name in missing} <= {
            id(parameter) for parameter in head.parameters()
        }
        hint = (
            "Only the output head is missing: this is the folder of a base or a classification model. Name one with a head; if "
            "the head is the embedding, set tie_word_embeddings to true in config.json."
            if without_head
            else "Is config.json of this model? To start from random weights use --model_config."
        )
        if self.unused:
            hint = f"The files have other names, such as {self.unused[0]}. {hint}"
        raise InputError(
            f"{self._folder}: holds no weights for {len(missing)} of the model's {len(self._shapes)} parameters:\n{lines}\n{hint}"
        )

    def _refuse_shape(self, name: str, found: tuple[int, ...], needed: tuple[int, ...]) -> None:
        if found != needed:
            why = (
                "ZeRO-3 leaves such empty tensors where a model is saved without gathering it: convert the checkpoint instead."
                if found == (0,)
                else "The weights and config.json do not belong together."
            )
            raise InputError(
                f"{self._folder}: {name} has shape {list(found)}, but the model of config.json needs {list(needed)}. {why}"
            )

    def _check_buffers(self) -> None:
        """See that the folder has every saved buffer, but for those that the model may do without.

        Raises:
            InputError: it names one that is missing or has another shape.
        """
        optional: Any = getattr(self.skeleton, "_keys_to_ignore_on_load_missing", None) or ()
        for name, own in self._buffers.items():
            file_name = self._buffer_files.get(name)
            if file_name is not None:
                self._refuse_shape(file_name, self._files.shape(file_name), tuple(own.shape))
            elif holds_sentinel(own) or not any(re.search(pattern, name) for pattern in optional):
                raise InputError(
                    f"{self._folder}: holds no value for {name}, a buffer that is part of the model's state. Is config.json "
                    "of this model? Save the folder once more with the program that made it, or add the tensor."
                )

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        return {
            name: self._files.file_of[self._buffer_files[name]].tensor(self._buffer_files[name])
            if name in self._buffer_files
            else own
            for name, own in self._buffers.items()
        }

    def _refuse_codes(self) -> None:
        """Codes of quantised weights have the shape of the weights, now and then, and never are them."""
        for name, file_name in [*self._plain.items(), *((n, f) for n, files in self._sources.items() for f in files)]:
            dtype = self._files.file_of[file_name].entries[file_name].dtype
            if dtype not in WEIGHT_DTYPES:
                raise InputError(
                    f"{self._files.file_of[file_name].path}: {file_name} holds {str(dtype).removeprefix('torch.')}, the codes "
                    f"of a quantised weight, where the model needs {name} in bfloat16, float16 or float32. Dequantise the model "
                    "first, or train the one that it was made from."
                )

    def _targets(self, converted: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """All parameters that one conversion yields, each with that conversion's file names."""
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        targets: dict[str, list[str]] = {}
        for first, file_names in converted.items():
            targets[first] = file_names
            for converter in converters:
                own = [pattern for pattern in converter.target_patterns if pattern in first]
                for other in converter.target_patterns if own else []:
                    name = first.replace(own[0], other)
                    if name in self._shapes:
                        targets[name] = file_names
        return {name: file_names for name, file_names in targets.items() if name in self._shapes}

    def _check_conversions(self, converted: Mapping[str, list[str]]) -> None:
        """Run the conversions without values: an expert too few or too many shows in the shapes alone."""
        names = [name for file_names in converted.values() for name in file_names]
        entries = {name: self._files.file_of[name].entries[name] for name in names}
        shapes = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
        with _parameters_kept(self.skeleton):
            info = self._load_converted(shapes, "meta")
        for name, found, needed in info.mismatched_keys:
            self._refuse_shape(
                f"{name}, made of {', '.join(self._sources.get(name, names)[:2])} ...,", tuple(found), tuple(needed)
            )
        for name, reason in info.conversion_errors.items():
            raise InputError(f"{self._folder}: transformers cannot make {name} out of its files: {reason}")

    def _load_converted(self, tensors: Mapping[str, Any], device: str) -> Any:
        conversions: list[Any] = list(self._conversions)
        load = LoadStateDictConfig(device_map={"": device}, dtype=torch.float32, weight_mapping=conversions)
        bars = logging.set_tqdm_hook(_no_bar)  # one would appear for each tensor on each rank
        try:
            info, _ = convert_and_load_state_dict_in_model(self.skeleton, dict(tensors), load)
        finally:
            logging.set_tqdm_hook(bars)
        return info

    def _convert(self, name: str) -> dict[str, torch.Tensor]:
        with _parameters_kept(self.skeleton):
            self._load_converted({file_name: self._open(file_name) for file_name in self._sources[name]}, "cpu")
            made = {key: value.detach() for key, value in self.skeleton.named_parameters() if not value.is_meta}
        if name not in made:
            raise InputError(
                f"{self._folder}: transformers did not make {name} out of {', '.join(self._sources[name][:3])} ..."
            )
        return made

    def _open(self, file_name: str) -> Any:
        with safe_open(self._files.file_of[file_name].path, framework="pt") as file:
            return file.get_slice(file_name)

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened parameter into `out`."""
        if name in self._plain:
            self._files.read_into(self._plain[name], start, out)
        else:
            self._made.read_into(kind, name, start, out)


@contextmanager
def _parameters_kept(model: nn.Module) -> Iterator[None]:
    """Put every parameter back afterwards: transformers sets new ones where it loads."""
    before = [
        (module, key, parameter)
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False)
    ]
    try:
        yield
    finally:
        for module, key, parameter in before:
            module._parameters[key] = parameter


def _apart(others: Mapping[str, str], is_left_out: Callable[[str], bool]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What stands for nothing in the model, and what of that is meant to: file names."""
    unused = tuple(name for name, renamed in others.items() if not is_left_out(renamed))
    return unused, tuple(name for name, renamed in others.items() if is_left_out(renamed))


def shortened(names: Sequence[str]) -> str:
    """The first names of a list, a line each, and how many there are beside them."""
    more = [f"  and {len(names) - MOST_SHOWN} more"] if len(names) > MOST_SHOWN else []
    return "\n".join([*(f"  {name}" for name in names[:MOST_SHOWN]), *more])
