"""One rank's part of a checkpoint in DeepSpeed's own layout, written as safely as one of ours.

iter_0000100/  global_step100/  *_model_states.pt, *_optim_states.pt: DeepSpeed's, pickles
               latest           names that folder, for DeepSpeed
               zero_to_fp32.py  DeepSpeed's script, which makes one state_dict of it
               manifest.json, state.json, ...  as in every checkpoint; the manifest has the hashes of all files
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import xxhash

from ds_recipes.checkpoint.files import FileRecord, write_file
from ds_recipes.checkpoint.native.folders import LAYOUT
from ds_recipes.checkpoint.rank_file import OwnRange, Written, own_ranges, values_in
from ds_recipes.engine.base import Engine
from ds_recipes.fsops import calls
from ds_recipes.world.group import World

BYTES_A_VALUE = 4
SCRIPT = Path("utils/zero_to_fp32.py")  # within DeepSpeed's package
LATEST = "latest"
BESIDE = (LATEST, SCRIPT.name)
"""What lies in such a checkpoint for DeepSpeed's use, outside of its folder."""


def tag_of(step: int) -> str:
    """The folder of DeepSpeed's files within a checkpoint."""
    return f"global_step{step}"


class HashedFile:
    """A new file for whoever wants to write by himself: hashed on the way, durable once it is closed.

    It does not raise, since its writer may be amid something that no rank may leave alone; `record` tells what went wrong.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hasher = xxhash.xxh3_128()
        self._size = 0
        self._error: OSError | None = None
        self._descriptor: int | None = None
        with self._remembering():
            self._descriptor = calls.create(path)

    def write(self, data: bytes) -> int:
        if self._descriptor is not None and self._error is None:
            with self._remembering():
                calls.write(self._descriptor, self._path, data)
                self._hasher.update(data)
                self._size += len(data)
        return len(data)

    def flush(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is None:
            return
        with self._remembering():
            if self._error is None:
                calls.sync_file(self._descriptor, self._path)
        os.close(self._descriptor)

    def record(self) -> FileRecord:
        """What was written.

        Raises:
            OSError: with the path, the first failure.
        """
        if self._error is not None:
            raise self._error
        return FileRecord(self._size, self._hasher.hexdigest())

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self._path)
            self._error = self._error or error


class NativePart:
    """What this rank writes of a checkpoint after `step`, out of an engine that must not train meanwhile."""

    layout = LAYOUT
    communicates = True

    def __init__(self, engine: Engine, world: World, step: int) -> None:
        self._engine = engine
        self._world = world
        self._step = step
        self._ranges = own_ranges(engine.shards(), world, save_optimizer=True)

    @property
    def num_bytes(self) -> int:
        """DeepSpeed's files hold the model's own weights too, in the precision that it computes in; float32 is assumed."""
        own = sum(one.length for one in self._ranges)
        return (values_in(self._ranges) + own) * BYTES_A_VALUE

    def write(self, partial: Path) -> Written:
        """Let DeepSpeed write. Every rank must call it: DeepSpeed waits for all in it.

        Raises:
            OSError: with the path.
        """
        tag = tag_of(self._step)
        made: dict[str, HashedFile] = {}

        def create(path: Path) -> HashedFile:
            with suppress(OSError):  # there already; else making the file fails, which is remembered
                calls.make_folder(path.parent)
            return made.setdefault(f"{tag}/{path.name}", HashedFile(path))

        self._engine.write_native(partial, tag, self._step, create)
        files = {name: file.record() for name, file in made.items()}
        calls.sync_folder(partial / tag)
        if self._world.rank == 0:
            files[LATEST] = write_file(partial / LATEST, [tag.encode()])
            files[SCRIPT.name] = write_file(partial / SCRIPT.name, [(_deepspeed_folder() / SCRIPT).read_bytes()])
        return Written(files, tuple(replace(one, file=_file_of(one, tag, files)) for one in self._ranges))


def _file_of(one: OwnRange, tag: str, files: Mapping[str, FileRecord]) -> str:
    """Where a range lies: with the optimizer, or, without moments, with the model, which rank 0 alone writes below stage 3."""
    suffix = "_optim_states.pt" if len(one.kinds) > 1 else "_model_states.pt"
    return next((name for name in files if name.endswith(suffix)), f"{tag}/mp_rank_00_model_states.pt")


def _deepspeed_folder() -> Path:
    """DeepSpeed's package, which need not be imported for this."""
    spec = find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
