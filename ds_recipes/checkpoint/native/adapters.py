"""LoRA as PEFT lays it out in a checkpoint: merged into the weights while they are read, or the adapter's tensors alone.

PEFT wraps the model (`base_model.model.`) and each trained layer: its own weight is `base_layer.weight`, beside it lie
`lora_A.ADAPTER.weight` [r, in] and `lora_B.ADAPTER.weight` [out, r]. A module that trains in full has a copy,
`modules_to_save.ADAPTER`, beside the unused `original_module`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import torch

from ds_recipes.errors import InputError
from ds_recipes.ranges import COPY_BYTES, RangeReader

CONFIG = "adapter_config.json"
WRAPPER = "base_model.model."
MATRIX = re.compile(r"(?P<module>.+)\.(?P<kind>lora_|lora_embedding_)(?P<side>[AB])(\.(?P<adapter>[^.]+))??(\.weight)?")
COPY = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")
UNUSED = re.compile(r".+\.original_module\..+")
FOREIGN = re.compile(r".+\.(lora_\w*|ia3_\w*|hada_\w*|lokr_\w*|vera_\w*|oft_\w*|token_adapter|prompt_\w*)\b.*")


class SourceReader(RangeReader, Protocol):
    """What both readers of this package have beside ranges."""

    folder: Path
    tied: dict[str, str]
    trained_in: str | None
    step: int | None


@dataclass(frozen=True)
class _Delta:
    """What is added to a weight: scaling * left @ right, [rows, r] @ [r, columns], both float32."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float


def lacks_base(reader: SourceReader) -> bool:
    """True if a checkpoint holds LoRA and not the weights that it is added to: it was saved without frozen parameters."""
    plain = _base_names([*reader.names, *reader.tied])
    return any(
        match["side"] == "A" and f"{match['module'].removeprefix(WRAPPER)}.weight" not in plain
        for match in map(MATRIX.fullmatch, reader.names)
        if match
    )


class OverBase:
    """A checkpoint without frozen parameters, and the base model's for what it lacks, both under PEFT's names."""

    def __init__(self, reader: SourceReader, base: RangeReader) -> None:
        self._reader, self._base = reader, base
        self.folder, self.trained_in, self.step = reader.folder, reader.trained_in, reader.step
        self.optimizer_step, self.missed_steps = reader.optimizer_step, reader.missed_steps
        self.tied = reader.tied
        own = _base_names([*reader.names, *reader.tied])
        self._of_base = {f"{WRAPPER}{name}": name for name in base.names if name not in own}

    @property
    def names(self) -> list[str]:
        return [*self._reader.names, *self._of_base]

    def shape(self, name: str) -> tuple[int, ...]:
        own = self._of_base.get(name)
        return self._reader.shape(name) if own is None else self._base.shape(own)

    def has(self, kind: str) -> bool:
        return kind == "fp32"

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        """The base model's, and in their place those that the checkpoint has."""
        return {f"{WRAPPER}{name}": buffer for name, buffer in self._base.buffers.items()} | dict(self._reader.buffers)

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened parameter into `out`, converting its dtype."""
        own = self._of_base.get(name)
        if own is None:
            self._reader.read_into(kind, name, start, out)
        else:
            self._base.read_into(kind, own, start, out)


def with_adapters(reader: SourceReader, adapter_config: Path | None, merge: bool) -> RangeReader:
    """The reader itself where it holds no LoRA; else the model with LoRA merged, or the adapter under PEFT's names.

    Args:
        adapter_config: PEFT's adapter_config.json; None: it lies beside the checkpoint.
        merge: add the adapters to the weights, in float32; False: only what PEFT's own save would hold.

    Raises:
        InputError: no settings, several adapters, a kind of adapter that is not LoRA, or no weights to merge into.
    """
    names = list(reader.names)
    adapters = {match["adapter"] for name in names for match in (MATRIX.fullmatch(name), COPY.fullmatch(name)) if match}
    foreign = next((name for name in names if FOREIGN.fullmatch(name) and not MATRIX.fullmatch(name)), None)
    if foreign is not None:
        raise InputError(
            f"{reader.folder}: {foreign} belongs to an adapter that is not plain LoRA; only LoRA can be exported"
        )
    if not adapters:
        return reader
    if len(adapters) > 1:
        raise InputError(
            f"{reader.folder}: holds several adapters ({', '.join(sorted(map(str, adapters)))}); only one can be read"
        )
    if not merge:
        return _Renamed(reader, _saved_names(names))
    return _Merged(reader, _read_settings(reader.folder, adapter_config))


def _read_settings(folder: Path, given: Path | None) -> dict[str, Any]:
    places = [given] if given is not None else [folder / CONFIG, folder.parent / CONFIG]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise InputError(
            f"{folder}: holds LoRA, but no {CONFIG} lies beside it, which has its alpha. Name it with --adapter_config."
        )
    try:
        settings = json.loads(path.read_bytes())
        float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the settings of a LoRA adapter ({error!r})") from error
    if settings.get("use_dora") or settings.get("lora_bias") or settings.get("alora_invocation_tokens"):
        raise InputError(
            f"{path}: use_dora, lora_bias and alora_invocation_tokens are not plain LoRA, and are not merged"
        )
    found: dict[str, Any] = settings
    return found


def _saved_names(names: Sequence[str]) -> dict[str, str]:
    """PEFT's names in a saved adapter, and where the values are: without the adapter's own name."""
    found = {}
    for name in names:
        if match := COPY.fullmatch(name):
            found[f"{match['module']}.{match['rest']}"] = name
        elif match := MATRIX.fullmatch(name):
            weight = ".weight" if name.endswith(".weight") else ""
            found[f"{match['module']}.{match['kind']}{match['side']}{weight}"] = name
    return {name if name.startswith(WRAPPER) else WRAPPER + name: source for name, source in found.items()}


def _base_names(names: Sequence[str]) -> dict[str, str]:
    """The names of the model without PEFT, and where their values are."""
    found = {}
    for name in names:
        copy = COPY.fullmatch(name)
        if MATRIX.fullmatch(name) or UNUSED.fullmatch(name):
            continue
        plain = f"{copy['module']}.{copy['rest']}" if copy else name
        found[plain.removeprefix(WRAPPER).replace(".base_layer.", ".")] = name
    return found


class _Renamed:
    """A reader whose parameters have other names; those that are not named are left out. Weights only."""

    def __init__(self, reader: SourceReader, sources: Mapping[str, str]) -> None:
        self._reader = reader
        self._sources = dict(sources)
        self.folder, self.trained_in, self.step = reader.folder, reader.trained_in, reader.step
        self.optimizer_step, self.missed_steps = reader.optimizer_step, reader.missed_steps
        self.tied: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._source(name))

    def has(self, kind: str) -> bool:
        return kind == "fp32"

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        """Those of the model, under its own names; an adapter has none."""
        return {}

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened parameter into `out`, converting its dtype."""
        self._reader.read_into(kind, self._source(name), start, out)

    def _source(self, name: str) -> str:
        return self._sources[self.tied.get(name, name)]


class _Merged(_Renamed):
    """The model's own names and weights, with what LoRA learned added to them."""

    def __init__(self, reader: SourceReader, settings: Mapping[str, Any]) -> None:
        names = list(reader.names)
        super().__init__(reader, _base_names(names))
        others = _base_names(list(reader.tied))
        plain = {source: name for name, source in self._sources.items()}
        self.tied = {
            name: plain[reader.tied[other]]
            for name, other in others.items()
            if reader.tied[other] in plain and name not in self._sources
        }
        self._deltas = {}
        for name in names:
            match = MATRIX.fullmatch(name)
            if match and match["side"] == "A":
                target = f"{match['module'].removeprefix(WRAPPER)}.weight"
                other = name.replace(f".{match['kind']}A", f".{match['kind']}B")
                if target not in self._sources:
                    raise InputError(
                        f"{reader.folder}: {target} is not in it, so nothing can be merged into it: it was saved without frozen "
                        "parameters. Name the base model's folder with --model, or export the adapter alone, with --lora adapter."
                    )
                self._deltas[target] = self._delta(match, name, other, settings)

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        found = self._reader.buffers
        return {name: found[source] for name, source in _base_names(list(found)).items()}

    def _delta(self, match: re.Match[str], name: str, other: str, settings: Mapping[str, Any]) -> _Delta:
        narrow, wide = self._whole(name), self._whole(other)  # [r, in], [out, r]
        target = f"{match['module'].removeprefix(WRAPPER)}.weight"
        turned = bool(settings.get("fan_in_fan_out")) or match["kind"] == "lora_embedding_"
        left, right = (narrow.T.contiguous(), wide.T.contiguous()) if turned else (wide, narrow)
        shape = self.shape(target)
        if shape != (left.shape[0], right.shape[1]):
            raise InputError(
                f"{self.folder}: {target} is {list(shape)}, its LoRA makes {[left.shape[0], right.shape[1]]}"
            )
        return _Delta(left, right, _scaling(match["module"].removeprefix(WRAPPER), narrow.shape[0], settings))

    def _whole(self, source: str) -> torch.Tensor:
        shape = self._reader.shape(source)
        flat = torch.empty(torch.Size(shape).numel())
        self._reader.read_into("fp32", source, 0, flat)
        return flat.reshape(shape)

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the merged, flattened weight into `out`, converting its dtype."""
        delta = self._deltas.get(self.tied.get(name, name))
        if delta is None:
            super().read_into(kind, name, start, out)
            return
        columns = delta.right.shape[1]
        step = max(1, COPY_BYTES // 4 // columns) * columns
        for low in range(0, out.numel(), step):
            piece = torch.empty(min(step, out.numel() - low))
            super().read_into(kind, name, start + low, piece)
            first, last = (start + low) // columns, -(-(start + low + piece.numel()) // columns)
            rows = (delta.left[first:last] @ delta.right).mul_(delta.scaling).reshape(-1)
            piece += rows[start + low - first * columns :][: piece.numel()]
            out[low : low + piece.numel()].copy_(piece)


def _scaling(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """PEFT's alpha / r, or alpha / sqrt(r) with use_rslora; `alpha_pattern` has an alpha for some modules."""
    patterns: Mapping[str, float] = settings.get("alpha_pattern") or {}
    found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(settings["lora_alpha"] if found is None else patterns[found])
    return alpha / (sqrt(rank) if settings.get("use_rslora") else rank)
