"""Are a folder's weights whole? Read from the headers of the safetensors files alone, so that the size does not matter."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_recipes.errors import InputError

INDEX = "model.safetensors.index.json"
CONFIGS = ("config.json", "adapter_config.json")
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def check_weights(folder: Path, names: Sequence[str]) -> None:
    """See that the chosen files are a model: a config, and safetensors files that are complete.

    Raises:
        InputError: a part is missing, cut off, or not what it says.
    """
    config = next((name for name in CONFIGS if name in names), None)
    if config is None:
        raise InputError(
            f"--path {folder}: no config.json in it, so it is no Hugging Face model. Name the folder that "
            "tools/convert_to_hf.py wrote; for a folder of several such folders add --each branch or --each tag."
        )
    _read_object(folder / config)
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if not weights:
        raise InputError(f"--path {folder}: no safetensors file in it, so there are no weights to upload")
    tensors = {name: _tensors(folder / name) for name in weights}
    if INDEX in names:
        _check_index(folder, tensors)
    elif config == CONFIGS[0] and "model.safetensors" not in weights and any("-of-" in name for name in weights):
        raise InputError(f"--path {folder}: {weights[0]} is one of several files, but {INDEX} is missing")


def _check_index(folder: Path, tensors: dict[str, set[str]]) -> None:
    where = _read_object(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise InputError(f"{folder / INDEX}: has no weight_map of tensors to files")
    missing = sorted(set(where.values()) - set(tensors))
    if missing:
        raise InputError(f"--path {folder}: {missing[0]} is missing, which {INDEX} names")
    wrong = next((tensor for tensor, name in where.items() if tensor not in tensors[name]), None)
    if wrong is not None:
        raise InputError(f"{folder / where[wrong]}: has no tensor {wrong}, which {INDEX} says lies there")


def _tensors(path: Path) -> set[str]:
    """The names in a safetensors file, if its data is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise InputError(f"{path}: cut off or no safetensors file")
        text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: its header cannot be read ({type(error).__name__})") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise InputError(f"{path}: {size:,} bytes long, but its header speaks of {expected:,}. Export the model again.")
    return set(header) - {"__metadata__"}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return content
