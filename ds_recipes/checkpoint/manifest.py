"""The manifest: what a checkpoint consists of. It is written last, and carries its own hash.

Every parameter lists its cover: (file, start, length) ranges of the flattened tensor, in ascending order and without
gaps. The same cover holds for each kind that was saved: `fp32` (master weights), `exp_avg` and `exp_avg_sq`; a frozen
parameter has its weights only. The model's saved buffers lie whole in a file of their own.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ds_recipes.checkpoint.files import MADE_OTHERWISE, FileRecord, hash_bytes, read_bytes, unreadable
from ds_recipes.errors import CheckpointError

FORMAT = "ds_recipes flat ranges"
VERSIONS = (1, 2)
"""2 is a checkpoint with saved buffers; one without is written as 1, which older programs read too."""
MANIFEST = "manifest.json"
STATE = "state.json"
PROBE = "probe.safetensors"
BUFFERS = "buffers.safetensors"

RANGES = "ranges"
"""The layout of the ranks' files that this package reads and writes itself."""


@dataclass(frozen=True)
class Range:
    """Elements [start, start + length) of a flattened parameter, in a file of the checkpoint."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Parameter:
    """A parameter's full shape and the ranges that cover it."""

    shape: tuple[int, ...]
    cover: tuple[Range, ...]


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's table of contents.

    `files` holds every file but the manifest itself; `tied` maps further names of a shared parameter to its own;
    `engine` is what the engine said of its precision and sharding; `frozen` names the parameters without moments where
    others have them; `missed_steps` by how many steps a parameter is behind `optimizer_step`, where it has been without a
    gradient or frozen; `buffers` are the shapes of the model's saved buffers, by name. `layout` says what the ranks' files
    are: "ranges", or another program's, which may lie one folder down.
    """

    step: int
    optimizer_step: int
    kinds: tuple[str, ...]
    files: Mapping[str, FileRecord]
    parameters: Mapping[str, Parameter]
    tied: Mapping[str, str]
    engine: Mapping[str, Any]
    frozen: tuple[str, ...] = ()
    missed_steps: Mapping[str, int] = field(default_factory=dict)
    layout: str = RANGES
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters."""
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def to_bytes(self) -> bytes:
        """JSON text, with the hash of its content in it."""
        content = {
            "step": self.step,
            "optimizer_step": self.optimizer_step,
            "kinds": list(self.kinds),
            "layout": self.layout,
            "files": {name: _entry(record) for name, record in self.files.items()},
            "parameters": {
                name: {
                    "shape": list(parameter.shape),
                    "cover": [[part.file, part.start, part.length] for part in parameter.cover],
                }
                for name, parameter in self.parameters.items()
            },
            "tied": dict(self.tied),
            "engine": dict(self.engine),
            "frozen": list(self.frozen),
            "missed_steps": dict(self.missed_steps),
        }
        if self.buffers:
            content["buffers"] = {name: list(shape) for name, shape in self.buffers.items()}
        version = VERSIONS[1] if self.buffers else VERSIONS[0]
        head = {"format": FORMAT, "version": version, "xxh3_128": hash_bytes(_canonical(content))}
        return (json.dumps(head | content, separators=(",", ":")) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and see that it is whole and makes sense.

    Raises:
        CheckpointError: missing, damaged, of a newer version, naming files outside, or with a parameter not covered.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(read_bytes(path))
        head = {key: content.pop(key) for key in ("format", "version", "xxh3_128")}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        if error.errno not in MADE_OTHERWISE:
            raise unreadable(path, error) from error
        raise CheckpointError(f"{path} is damaged ({error})") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    if head["format"] != FORMAT or head["version"] not in VERSIONS:
        raise CheckpointError(
            f"{path} is of format {head['format']!r}, version {head['version']}; this program reads {FORMAT!r}, versions "
            f"{VERSIONS[0]} to {VERSIONS[-1]}"
        )
    if head["xxh3_128"] != hash_bytes(_canonical(content)):
        raise CheckpointError(f"{path} is damaged (its content does not have the hash that it carries)")
    try:
        return _parse(content, path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} makes no sense ({error!r})") from error


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _entry(record: FileRecord) -> dict[str, Any]:
    parts = {"parts": dict(record.parts)} if record.parts else {}
    return {"bytes": record.size, "xxh3_128": record.xxh3_128, **parts}


def _parse(content: dict[str, Any], path: Path) -> Manifest:
    files = {
        name: FileRecord(entry["bytes"], entry["xxh3_128"], entry.get("parts", {}))
        for name, entry in content["files"].items()
    }
    layout = content.get("layout", RANGES)
    depth = 1 if layout == RANGES else 2
    outside = [name for name in files if not _lies_inside(name, depth)]
    if outside:
        raise CheckpointError(f"{path} names {outside[0]!r}, which is not a file of this folder; nothing was read")
    parameters = {
        name: Parameter(tuple(entry["shape"]), tuple(Range(*part) for part in entry["cover"]))
        for name, entry in content["parameters"].items()
    }
    buffers = {name: tuple(shape) for name, shape in content.get("buffers", {}).items()}
    if layout == RANGES:
        check_cover(parameters, files, str(path))
    if buffers and BUFFERS not in files:
        raise CheckpointError(f"{path} names buffers, and no {BUFFERS}")
    frozen = tuple(content.get("frozen", ()))
    return Manifest(
        step=content["step"],
        optimizer_step=content["optimizer_step"],
        kinds=tuple(content["kinds"]),
        files=files,
        parameters=parameters,
        tied=content["tied"],
        engine=content["engine"],
        frozen=frozen,
        missed_steps=dict.fromkeys(frozen, content["optimizer_step"]) | content.get("missed_steps", {}),
        layout=layout,
        buffers=buffers,
    )


def _lies_inside(name: str, depth: int) -> bool:
    """True for a plain relative name of at most `depth` parts."""
    parts = name.split("/")
    return len(parts) <= depth and not {"", ".", ".."}.intersection(parts) and "\0" not in name


def check_cover(parameters: Mapping[str, Parameter], files: Mapping[str, FileRecord], where: str) -> None:
    """See that every element of every parameter lies in exactly one range.

    Raises:
        CheckpointError: a gap, an overlap, or a file that the manifest does not list.
    """
    for name, parameter in parameters.items():
        position = 0
        for part in parameter.cover:
            if part.start != position or part.length <= 0 or part.file not in files:
                raise CheckpointError(
                    f"{where}: {name} is not covered: {part.file} holds [{part.start}, {part.start + part.length}) where "
                    f"element {position} is due"
                )
            position += part.length
        if position != prod(parameter.shape):
            raise CheckpointError(f"{where}: {name} has {prod(parameter.shape)} elements, {position} are covered")
