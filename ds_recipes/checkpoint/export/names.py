"""Another program's parameters under the names that the model has for them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ds_recipes.errors import CheckpointError
from ds_recipes.models.skeleton import left_out_by_transformers, parameter_shapes, saved_buffers, tied_names
from ds_recipes.ranges import COPY_BYTES, RangeReader

PREFIXES = ("module.", "_orig_mod.", "_forward_module.")
"""What wrappers of a model (data parallel, torch.compile, Lightning) put before all of its names."""


class ModelNames:
    """A range reader with exactly the model's parameters and saved buffers, each once, out of one that may call them otherwise.

    Of a tied parameter any of its names will do. If there are several, their values must be equal.
    """

    def __init__(self, reader: RangeReader, skeleton: PreTrainedModel, where: Path) -> None:
        """Find every parameter.

        Raises:
            CheckpointError: one is missing, has another shape, or is none of the model's; tied ones differ.
        """
        self._reader = reader
        self._shapes = parameter_shapes(skeleton)
        self.optimizer_step, self.missed_steps = reader.optimizer_step, reader.missed_steps
        aliases: dict[str, list[str]] = {name: [name] for name in self._shapes}
        for further, name in tied_names(skeleton).items():
            aliases[name].append(further)
        there = _plain_names([*reader.names, *getattr(reader, "tied", {}), *reader.buffers])
        self._buffers = saved_buffers(skeleton)
        self._buffer_sources = {name: there[name] for name in self._buffers if name in there}
        found = {name: [there[alias] for alias in mine if alias in there] for name, mine in aliases.items()}
        self._refuse_other_model(found, there, skeleton, where)
        for name, sources in found.items():
            for other in sources[1:]:
                self._refuse_untied(name, sources[0], other, where)
        self._sources = {name: sources[0] for name, sources in found.items()}

    @property
    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def has(self, kind: str) -> bool:
        return self._reader.has(kind)

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        """The saved ones, which another program may have kept among the parameters."""
        found = {}
        for name, source in self._buffer_sources.items():
            if source in self._reader.buffers:
                found[name] = self._reader.buffers[source]
            else:
                found[name] = torch.empty(self._buffers[name].shape, dtype=self._buffers[name].dtype)
                self._reader.read_into("fp32", source, 0, found[name].view(-1))
        return found

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened parameter into `out`."""
        self._reader.read_into(kind, self._sources[name], start, out)

    def _refuse_other_model(
        self, found: Mapping[str, list[str]], there: Mapping[str, str], skeleton: PreTrainedModel, where: Path
    ) -> None:
        problems = [f"  {name}: absent" for name, sources in found.items() if not sources]
        problems += [
            f"  {name}: {list(self._reader.shape(source))}, the model has {list(self._shapes[name])}"
            for name, sources in found.items()
            for source in sources
            if self._reader.shape(source) != self._shapes[name]
        ]
        for name, own in self._buffers.items():
            source = self._buffer_sources.get(name)
            if source is None:
                problems.append(f"  {name}: absent")
            elif (shape := self._shape_of_buffer(source)) != tuple(own.shape):
                problems.append(f"  {name}: {list(shape)}, the model has {list(own.shape)}")
        known = {source for sources in found.values() for source in sources} | {*self._buffer_sources.values()}
        is_left_out = left_out_by_transformers(skeleton)
        problems += [
            f"  {name}: no parameter of the model"
            for name, source in there.items()
            if source not in known and not is_left_out(name)
        ]
        if problems:
            more = [f"  and {len(problems) - 5} more"] if len(problems) > 5 else []
            raise CheckpointError(
                f"{where} holds another model than config.json describes ({skeleton.config.model_type}):\n"
                + "\n".join(problems[:5] + more)
                + "\nName the folder of the model that was trained with --model."
            )

    def _shape_of_buffer(self, source: str) -> tuple[int, ...]:
        apart = self._reader.buffers.get(source)
        return self._reader.shape(source) if apart is None else tuple(apart.shape)

    def _refuse_untied(self, name: str, one: str, other: str, where: Path) -> None:
        if getattr(self._reader, "tied", {}).get(other, other) == getattr(self._reader, "tied", {}).get(one, one):
            return
        numel = torch.Size(self._shapes[name]).numel()
        for start in range(0, numel, COPY_BYTES // 4):
            pair = torch.empty((2, min(COPY_BYTES // 4, numel - start)))
            self._reader.read_into("fp32", one, start, pair[0])
            self._reader.read_into("fp32", other, start, pair[1])
            if not torch.equal(pair[0], pair[1]):
                raise CheckpointError(
                    f"{where}: the model ties {one} and {other}, but they differ. If they were trained apart, set "
                    "tie_word_embeddings to false in the config.json of --model."
                )


def _plain_names(names: Sequence[str]) -> dict[str, str]:
    """The names without what wrappers put before all of them, and the names as they are."""
    plain = {name: name for name in names}
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if plain and all(name.startswith(prefix) for name in plain):
                plain = {name.removeprefix(prefix): source for name, source in plain.items()}
    return plain
