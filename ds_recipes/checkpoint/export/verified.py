"""Verify the weights of a checkpoint by the hash of their part of each file, while they are read."""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xxhash

from ds_recipes.checkpoint.files import FileRecord
from ds_recipes.checkpoint.load import read_buffers
from ds_recipes.checkpoint.manifest import Manifest
from ds_recipes.errors import CheckpointError
from ds_recipes.ranges import COPY_BYTES, SafetensorsFile, file_inside, raw_bytes

WEIGHTS = "fp32"


class VerifiedWeights:
    """A range reader over a checkpoint's weights; `finish` says whether what was read is what was saved.

    What is read in the order of the files, as an export does, is hashed on the way; the rest is read once more at the end.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._files: dict[str, _HashedFile] = {}
        self._buffer = torch.empty(COPY_BYTES // torch.float32.itemsize)
        self.optimizer_step, self.missed_steps = manifest.optimizer_step, manifest.missed_steps

    @property
    def names(self) -> Sequence[str]:
        return list(self._manifest.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._manifest.parameters[name].shape

    def has(self, kind: str) -> bool:
        return kind == WEIGHTS

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        """The saved ones, whose file was verified before."""
        return read_buffers(self._path, self._manifest)

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened parameter into `out`, converting its dtype."""
        assert kind == WEIGHTS
        end = start + out.numel()
        for part in self._manifest.parameters[name].cover:
            first, last = max(start, part.start), min(end, part.start + part.length)
            if first < last:
                target = out[first - start : last - start]
                self._open(part.file).read_into(f"{WEIGHTS}/{name}", first - part.start, target)

    def _open(self, name: str) -> "_HashedFile":
        if name not in self._files:
            self._files[name] = _HashedFile(file_inside(self._path, name), self._manifest.files[name], self._buffer)
        return self._files[name]

    def finish(self) -> None:
        """Compare every file's hash.

        Raises:
            CheckpointError: a file's weights, or its header, are not what was saved.
        """
        for name in {part.file for parameter in self._manifest.parameters.values() for part in parameter.cover}:
            self._open(name).finish()


class _HashedFile:
    """One rank's file, hashed up to element `_hashed` of the first tensor in `_order`."""

    def __init__(self, path: Path, record: FileRecord, buffer: torch.Tensor) -> None:
        self._file = SafetensorsFile(path)
        self._expected = record.parts[WEIGHTS]
        self._hasher = xxhash.xxh3_128(self._file.head())
        weights = {name: entry for name, entry in self._file.entries.items() if name.startswith(f"{WEIGHTS}/")}
        self._file.entries = weights  # thousands of ranks have as many tables
        self._order = deque(sorted(weights, key=lambda name: weights[name].begin))
        self._buffer = buffer
        self._hashed = 0

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Copy elements of a tensor, hash them if they are the next ones, and convert them.

        Raises:
            CheckpointError: the file's header does not have them, so it is damaged.
        """
        entry = self._file.entries.get(name)
        if entry is None or entry.dtype != torch.float32 or start + out.numel() > entry.numel:
            raise CheckpointError(
                f"{self._file.path.name} is damaged (its header does not hold {name} as it was saved)"
            )
        direct = out.dtype == torch.float32 and out.is_contiguous()
        for first in range(0, out.numel(), self._buffer.numel()):
            target = out[first : first + self._buffer.numel()]
            piece = target if direct else self._buffer[: target.numel()]
            self._file.read_into(name, start + first, piece)
            self._hash(name, start + first, piece)
            if not direct:
                target.copy_(piece)

    def _hash(self, name: str, start: int, piece: torch.Tensor) -> None:
        if not self._order or name != self._order[0] or start != self._hashed:
            return
        self._hasher.update(raw_bytes(piece))
        self._hashed += piece.numel()
        if self._hashed == self._file.entries[name].numel:
            self._order.popleft()
            self._hashed = 0

    def finish(self) -> None:
        while self._order:
            name = self._order[0]
            rest = self._file.entries[name].numel - self._hashed
            piece = self._buffer[:rest]
            self._file.read_into(name, self._hashed, piece)
            self._hash(name, self._hashed, piece)
        if self._hasher.hexdigest() != self._expected:
            raise CheckpointError(
                f"{self._file.path.name} is damaged (the hash of its weights is {self._hasher.hexdigest()}, {self._expected} was "
                "written)"
            )
