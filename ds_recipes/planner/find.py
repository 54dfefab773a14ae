"""Find a model's config, and the shapes in its safetensors files where they lie in a folder, without torch."""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ds_recipes.config.model_check import is_folder_name, quantised_weights
from ds_recipes.config.schema import Config
from ds_recipes.errors import ConfigError, InputError
from ds_recipes.hub_probe import ensure_hub_reachable_or_offline
from ds_recipes.planner.architecture import Architecture, Block, Kernels, Parameter
from ds_recipes.planner.families import FAMILIES, SAME_AS
from ds_recipes.planner.shapes import architecture_of, text_model

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
NO_PARAMETER = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias)$")
"""What old checkpoints keep beside their parameters."""


@dataclass(frozen=True)
class Found:
    """A model, where it was found, and what is to be said about it."""

    model: Architecture
    where: str
    notes: tuple[str, ...] = ()


def find_architecture(config: Config) -> Found:
    """The model that the settings name, with as many rows of the embedding as the run will have.

    Raises:
        ConfigError: the settings name none.
        InputError: it cannot be read, or is of a family that is not known and has no weights here.
    """
    path, folder = _config_file(config)
    values = _read_json(path)
    rows = _rows(config, values)
    shapes = _shapes_in(folder) if folder is not None else {}
    name = str(text_model(values).get("model_type"))
    if SAME_AS.get(name, name) in FAMILIES:
        model = architecture_of(values, str(path), rows)
        return Found(model, str(path), tuple(_disagreement(architecture_of(values, str(path)), shapes, folder)))
    if not shapes:
        architecture_of(values, str(path), rows)  # refuses it by name
    note = (
        f"models of type {name!r} are not known to the planner: their sizes were read from the files, their activations are "
        "taken to be like Llama's"
    )
    return Found(_from_files(values, shapes, str(path)), str(folder), (note,))


def _config_file(config: Config) -> tuple[Path, Path | None]:
    """The config's path, and the folder that may hold the weights."""
    if config.model.model_config is not None:
        return Path(config.model.model_config), None
    name = config.model.model_name
    if name is None:
        raise ConfigError(["neither model_name nor model_config is set: name a folder, a hub id or a config JSON"])
    if is_folder_name(name):
        return Path(name) / "config.json", Path(name)
    from huggingface_hub import hf_hub_download

    offline = not ensure_hub_reachable_or_offline()
    try:
        return Path(hf_hub_download(name, "config.json", local_files_only=offline)), None
    except (OSError, ValueError) as error:
        reason = "the hub could not be reached, and it is not in the cache" if offline else str(error).splitlines()[0]
        raise InputError(
            f"--model_name {name}: there is no such folder, and its config.json cannot be had from the hub: {reason}. "
            "Check the spelling, or pass a folder or --model_config."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a model's config ({error.strerror}). Check the path.") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}). Copy the file again.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: is no model's config: a JSON object is expected.")
    quantised = quantised_weights(values, path)
    if quantised is not None:
        raise InputError(quantised)
    return values


def _rows(config: Config, values: Mapping[str, Any]) -> int | None:
    """Rows of the embedding by the run's rule (`models/vocabulary.py`), each added token taken for a new row."""
    size = text_model(values).get("vocab_size")
    added = len(config.model.added_tokens) + len(config.model.added_plain_tokens)
    if not isinstance(size, int) or not (added or config.model.pad_vocabulary_to):
        return None
    rows = size + added
    multiple = config.model.pad_vocabulary_to or 1
    return -(-rows // multiple) * multiple


def _shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, out of the files' headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shapes.update(_header(path))
    return {name: shape for name, shape in shapes.items() if not NO_PARAMETER.search(name)}


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one file.

    Raises:
        InputError: it is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if not 0 < length <= MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length:,} bytes")
            table = json.loads(file.read(length))
        yield from ((name, tuple(entry["shape"])) for name, entry in table.items() if name != "__metadata__")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a safetensors file, or cut short ({error}). Download or copy it again."
        ) from error


def _disagreement(model: Architecture, shapes: Mapping[str, tuple[int, ...]], folder: Path | None) -> Iterator[str]:
    in_files = sum(map(prod, shapes.values()))
    if shapes and in_files not in (model.numel, model.numel + model.head_numel):  # a tied head may be stored too
        yield (
            f"the files of {folder} hold {in_files:,} parameters, but its config.json describes {model.numel:,}: a tensor is "
            "missing, or they belong to different models"
        )


def _from_files(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> Architecture:
    """A model of an unknown family: parameters with a layer's number in their names make its blocks."""
    text = text_model(values)
    try:
        hidden, vocabulary = int(text["hidden_size"]), int(text["vocab_size"])
        heads = int(text["num_attention_heads"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: {error} is missing, without which a model of type {text.get('model_type')!r} cannot be planned."
        ) from error
    blocks: dict[int, list[Parameter]] = {}
    tables: list[Parameter] = []
    rest: list[Parameter] = []
    head: list[Parameter] = []
    for name, shape in shapes.items():
        layer = re.search(r"\.(\d+)\.", name)
        parameter = Parameter(name, shape, is_bias=name.endswith("bias"))
        if layer:
            blocks.setdefault(int(layer[1]), []).append(parameter)
        elif vocabulary in shape and "head" not in name:
            tables.append(parameter)
        else:
            (head if vocabulary in shape else rest).append(parameter)
    inner = int(text.get("intermediate_size") or 4 * hidden)
    return Architecture(
        family=str(text.get("model_type")),
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        heads=heads,
        key_value_heads=int(text.get("num_key_value_heads") or heads),
        head_size=int(text.get("head_dim") or hidden // heads),
        embeddings=tuple(tables),
        blocks=tuple(
            Block(tuple((one,) for one in blocks[layer]), intermediate_size=inner) for layer in sorted(blocks)
        ),
        last=tuple(rest),
        head=() if text.get("tie_word_embeddings") else tuple(head),
        kernels=Kernels(norm="rms", norms=2, qk_norm="", mlp="gated", activation="one"),
        exact=True,
    )
