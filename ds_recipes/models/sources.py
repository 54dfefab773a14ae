"""Where initial weights come from: a Hugging Face folder or the model's own random initialisation.

Both are range readers (`ds_recipes/ranges.py`), so an engine fills its shards from them as it does from a checkpoint,
each rank on its own and without communication.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ds_recipes.errors import InputError
from ds_recipes.models.skeleton import initialiser, parameter_shapes, tied_names
from ds_recipes.ranges import HfFolder

KEPT_ELEMENTS = 1 << 18
"""Made tensors up to this size are kept: engines come back for the small ones (norms, biases) in a second pass."""

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class InitialWeights:
    """What every source of initial weights says of itself: names, shapes, and that there is no optimizer state."""

    optimizer_step = 0

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def has(self, kind: str) -> bool:
        return kind == "fp32"


class MadeWeights(InitialWeights):
    """A range reader over tensors that are made when they are first asked for, a group at a time.

    Only the newest group and the small tensors are held, so memory is bounded by the largest group.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], make_group: Callable[[str], dict[str, torch.Tensor]]
    ) -> None:
        super().__init__(shapes)
        self._make_group = make_group
        self._newest: dict[str, torch.Tensor] = {}
        self._small: dict[str, torch.Tensor] = {}

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
    numbers differ from a CPU's.
    """
    unit_of = _units(skeleton)

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
            return {f"{prefix}.{key}" if prefix else key: value.detach() for key, value in unit.named_parameters()}

    return MadeWeights(parameter_shapes(skeleton), make_group)


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
    """Give a unit's meta parameters float32 storage; back to meta afterwards, what was taken out stays alive."""
    homes = [
        (module, key, parameter)
        for module in unit.modules()
        for key, parameter in module.named_parameters(recurse=False)
    ]
    try:
        for module, key, parameter in homes:
            module._parameters[key] = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32, device=device))
        yield
    finally:
        for module, key, parameter in homes:
            module._parameters[key] = parameter


def _no_bar(_make: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What transformers takes instead of its own progress bar."""
    return logging.EmptyTqdm(*given, **named)


class FolderWeights(InitialWeights):
    """A range reader over a Hugging Face safetensors folder.

    A parameter that lies in the folder with its shape is read straight from the memory map. One that transformers
    renames keeps that way under its file name; one that it fuses or transposes goes through transformers' own
    conversion, one parameter at a time.
    """

    def __init__(self, skeleton: PreTrainedModel, folder: Path) -> None:
        super().__init__(parameter_shapes(skeleton))
        self._folder = folder
        self._skeleton = skeleton
        self._conversions = get_model_conversion_mapping(skeleton)
        self._files = HfFolder(folder)
        self._plain, self._sources = self._plan()
        self._refuse_codes()
        for name, file_name in self._plain.items():
            if self._files.shape(file_name) != self._shapes[name]:
                raise InputError(
                    f"{folder}: {file_name} has shape {list(self._files.shape(file_name))}, but the model of config.json "
                    f"needs {list(self._shapes[name])}. The weights and config.json do not belong together."
                )
        self._made = MadeWeights({name: self._shapes[name] for name in self._sources}, self._convert)

    def _plan(self) -> tuple[dict[str, str], dict[str, list[str]]]:
        """Which parameter is read as it lies (name -> file name), and which is made from which file names."""
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        meta = self._skeleton.state_dict()
        aliases = tied_names(self._skeleton)
        plain: dict[str, str] = {}
        sources: dict[str, list[str]] = {}
        for file_name in self._files.names:
            renamed, pattern = rename_source_key(
                file_name, renamings, converters, self._skeleton.base_model_prefix, meta
            )
            if renamed not in meta and file_name in meta:
                renamed, pattern = file_name, None
            canonical = aliases.get(renamed, renamed)
            if pattern is not None:
                sources.setdefault(renamed, []).append(file_name)
            elif canonical in self._shapes and (canonical not in plain or renamed == canonical):
                plain[canonical] = file_name
        targets = self._targets(sources, converters)
        missing = [name for name in self._shapes if name not in plain and name not in targets]
        if missing:
            raise InputError(
                f"{self._folder}: holds no weights for {len(missing)} of the model's {len(self._shapes)} parameters, "
                f"the first is {missing[0]}. Is config.json of this model? To start from random weights use --model_config."
            )
        return plain, targets

    def _targets(self, sources: dict[str, list[str]], converters: list[WeightConverter]) -> dict[str, list[str]]:
        """All parameters that one conversion yields, each with that conversion's file names."""
        targets: dict[str, list[str]] = {}
        for first, file_names in sources.items():
            targets[first] = file_names
            for converter in converters:
                own = [pattern for pattern in converter.target_patterns if pattern in first]
                for other in converter.target_patterns if own else []:
                    name = first.replace(own[0], other)
                    if name in self._shapes:
                        targets[name] = file_names
        return targets

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

    def _convert(self, name: str) -> dict[str, torch.Tensor]:
        before = dict(self._skeleton.named_parameters())
        tensors = {file_name: self._open(file_name) for file_name in self._sources[name]}
        conversions: list[Any] = list(self._conversions)
        load = LoadStateDictConfig(device_map={"": "cpu"}, dtype=torch.float32, weight_mapping=conversions)
        bars = logging.set_tqdm_hook(_no_bar)  # one would appear for each tensor on each rank
        try:
            convert_and_load_state_dict_in_model(self._skeleton, tensors, load)
        finally:
            logging.set_tqdm_hook(bars)
        made: dict[str, torch.Tensor] = {}
        for key, parameter in list(self._skeleton.named_parameters()):
            if not parameter.is_meta:
                made[key] = parameter.detach()
                owner, _, leaf = key.rpartition(".")
                self._skeleton.get_submodule(owner)._parameters[leaf] = before[key]
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
