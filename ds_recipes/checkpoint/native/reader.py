"""Read any range of any parameter out of DeepSpeed's own checkpoint folders, of stages 0 to 3 and of the universal form."""

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from pathlib import Path

import torch

from ds_recipes.checkpoint.native.folders import LAYOUT, Files, check_ranks, find_files, inside
from ds_recipes.checkpoint.native.model_states import ModelStates, read_model_states
from ds_recipes.checkpoint.native.partitions import Partitions, read_partitions
from ds_recipes.checkpoint.native.pickles import load_pickle
from ds_recipes.checkpoint.native.pieces import copy_flat, read_pieces
from ds_recipes.engine.optimizer import MOMENTS
from ds_recipes.errors import CheckpointError, InputError

OPEN_FILES = 64  # of the universal form, which has a file a parameter and kind


def open_deepspeed(path: Path, trust_pickle: bool = False) -> "DeepSpeedReader":
    """Open `path`: a `global_stepN` folder, a folder whose `latest` names one, or a folder of the universal form.

    Nothing but names and shapes is read; the values stay in the mapped files until they are asked for.

    Raises:
        InputError: a file is missing, damaged, leads out of the folder, or is laid out in a way that is not known; or its
            pickle needs code that is not known to be harmless, and `trust_pickle` is False.
    """
    files = find_files(path)
    model = read_model_states(files.model, trust_pickle)
    if not files.model[0].name.startswith("mp_rank_"):
        check_ranks(files.folder, "the *_model_states.pt", len(files.model), model.ranks)
    if files.universal is not None:
        return _Universal(files, model, trust_pickle)
    if not model.is_zero:
        return DeepSpeedReader(files, model, Partitions({}, ("fp32",), model.applied_steps))
    return DeepSpeedReader(files, model, read_partitions(files.optimizer, model, trust_pickle))


def open_layout(path: Path, layout: str, optimizer_step: int, missed_steps: Mapping[str, int]) -> "DeepSpeedReader":
    """Open a checkpoint of ours whose values are in another program's layout; its manifest knows the optimizer's steps.

    Raises:
        CheckpointError: the layout is not known.
        InputError: as `open_deepspeed`.
    """
    if layout != LAYOUT:
        raise CheckpointError(
            f"{path}: its values are in the layout {layout!r}; this program reads {LAYOUT!r} and its own"
        )
    reader = open_deepspeed(path)
    reader.optimizer_step, reader.missed_steps = optimizer_step, missed_steps
    return reader


class DeepSpeedReader:
    """A range reader over DeepSpeed's files.

    `names` has every parameter once; `tied` maps further names of a shared one to its own, and both can be read. `frozen`
    are those without an optimizer. `buffers` are the model's buffers, which are not parameters. `trained_in` is the dtype
    that the model computed in, `step` the number of steps in DeepSpeed's count.
    """

    def __init__(self, files: Files, model: ModelStates, partitions: Partitions) -> None:
        self.folder = files.folder
        self.tied: dict[str, str] = dict(model.tied)
        self.trained_in, self.step = model.trained_in, model.step
        self.buffers: Mapping[str, torch.Tensor] = model.buffers
        self.frozen = tuple(model.shapes)
        self.optimizer_step = partitions.optimizer_step
        self.missed_steps: Mapping[str, int] = {}
        self._shapes = {name: shape for group in model.trained for name, shape in group.items()} | model.shapes
        self._pieces = partitions.pieces | model.others
        self._kinds = partitions.kinds

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[self.tied.get(name, name)]

    def has(self, kind: str) -> bool:
        return kind in self._kinds

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened parameter into `out`, converting its dtype.

        The moments of a parameter that was frozen are zeros: it has not been trained yet.
        """
        name = self.tied.get(name, name)
        if start < 0 or start + out.numel() > prod(self._shapes[name]):
            raise IndexError(
                f"{self.folder}: {name} has {prod(self._shapes[name])} elements, not [{start}, +{out.numel()})"
            )
        if kind != "fp32" and name in self.frozen:
            out.zero_()
        elif out.numel():
            self._read(kind, name, start, out)

    def _read(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        read_pieces(self._pieces[name], kind, start, out)


class _Universal(DeepSpeedReader):
    """The universal form: zero/NAME/fp32.pt, exp_avg.pt and exp_avg_sq.pt hold a parameter whole."""

    def __init__(self, files: Files, model: ModelStates, trust: bool) -> None:
        assert files.universal is not None
        self._zero, self._trust = files.universal, trust
        self._trained = {name for group in model.trained for name in group}
        kinds = ("fp32", *(kind for kind in MOMENTS if all(self._file(name, kind).is_file() for name in self._trained)))
        super().__init__(files, model, Partitions({}, kinds, model.applied_steps))
        self._open = lru_cache(OPEN_FILES)(self._load)
        missing = [name for name in sorted(self._trained) if not self._file(name, "fp32").is_file()]
        if missing:
            number = f"{len(missing)} of {len(self._trained)}"
            raise InputError(
                f"{self._file(missing[0], 'fp32')}: missing, as {number} parameters' files are. Copy the folder whole, "
                "or convert it again."
            )

    def _file(self, name: str, kind: str) -> Path:
        return inside(self._zero, self._zero / name / f"{kind}.pt")

    def _load(self, name: str, kind: str) -> torch.Tensor:
        path = self._file(name, kind)
        content = load_pickle(path, self._trust)
        is_expert = isinstance(content, dict) and content.get("is_expert_param")
        tensor = content.get("param") if isinstance(content, dict) else content
        if is_expert or not isinstance(tensor, torch.Tensor) or tensor.numel() != prod(self._shapes[name]):
            raise InputError(
                f"{path}: should hold {list(self._shapes[name])} of {name}" + (", not experts" if is_expert else "")
            )
        return tensor.detach().reshape(-1)

    def _read(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        if name in self._trained:
            copy_flat(self._open(name, kind)[start : start + out.numel()], out)
        else:
            super()._read(kind, name, start, out)
