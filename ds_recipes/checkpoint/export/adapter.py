"""A LoRA adapter as PEFT saves one: adapter_model.safetensors and adapter_config.json."""

import json
from pathlib import Path
from typing import Any

from ds_recipes.checkpoint.export.pieces import Piece
from ds_recipes.checkpoint.export.weights import DTYPES, WeightFiles
from ds_recipes.errors import InputError
from ds_recipes.fsops.durable import write_file
from ds_recipes.ranges import RangeReader, SafetensorsFile

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_adapter(folder: Path, reader: RangeReader, dtype: str, config: dict[str, Any]) -> list[Piece]:
    """Write both files and look at them again; returns the tensors."""
    pieces = [Piece(name, reader.shape(name), name, ((0, _numel(reader, name)),)) for name in reader.names]
    WeightFiles(reader, dtype).write(folder / TENSORS, pieces)
    write_file(folder / CONFIG, [(json.dumps(config, indent=2, sort_keys=True) + "\n").encode()])
    entries = SafetensorsFile(folder / TENSORS).entries
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        piece.name: (DTYPES[dtype], piece.shape) for piece in pieces
    }
    return pieces


def _numel(reader: RangeReader, name: str) -> int:
    numel = 1
    for length in reader.shape(name):
        numel *= length
    return numel


def read_adapter_config(checkpoint: Path, given: Path | None, base_model: str | None) -> dict[str, Any]:
    """PEFT's settings of the adapter, with the base model that was named.

    Raises:
        InputError: there is no such file, or it is not PEFT's.
    """
    folder = checkpoint.parent if checkpoint.is_file() else checkpoint
    places = [given] if given is not None else [folder / CONFIG, folder.parent / CONFIG]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(
            f"{places[0]}: missing. PEFT's {CONFIG} is needed to load an adapter: name it with --adapter_config."
        )
    try:
        config = json.loads(path.read_bytes())
        if config["peft_type"] != "LORA":
            raise InputError(f"{path}: is of type {config['peft_type']}; only LORA can be exported")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an {CONFIG} of PEFT ({error!r})") from error
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    return {**config, "inference_mode": True}
