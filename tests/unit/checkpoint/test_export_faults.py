"""A fault while exporting, or in what is exported: it is named, nothing is published, and the source stays as it is."""

import errno
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ds_recipes.checkpoint.export.verified import VerifiedWeights
from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.whole import DEAD_SECONDS, export
from ds_recipes.checkpoint.manifest import read_manifest
from ds_recipes.errors import CheckpointError, InputError
from ds_recipes.ranges import SafetensorsFile
from tests.unit.checkpoint.export_material import at_first, checkpoint_of
from tests.unit.checkpoint.flat_engine import save
from tests.unit.models.tiny import tiny_model


def test_an_existing_target_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tiny_model("llama"), tmp_path, {})
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").touch()
    with pytest.raises(InputError, match="exists already"):
        export(checkpoint, taken)
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]


def test_each_damage_to_the_weights_or_the_small_files_is_found(tmp_path: Path) -> None:
    """The weights are verified while they are read, whatever the ranks; the moments are not read at all."""
    checkpoint = checkpoint_of(tiny_model("llama_tied"), tmp_path, {})
    (rank_file,) = checkpoint.glob("rank-*")
    entries = SafetensorsFile(rank_file).entries
    weights = [(entry.begin, 4 * entry.numel) for name, entry in entries.items() if name.startswith("fp32/")]
    chosen = random.Random(0)
    damages = [(rank_file, begin + chosen.randrange(size)) for begin, size in weights]
    damages += [(rank_file, 8 + chosen.randrange(len(SafetensorsFile(rank_file).head()) - 8)) for _ in range(9)]
    damages += [(checkpoint / name, 5) for name in ("config.json", "state.json", "probe.safetensors", "manifest.json")]
    for number, (path, position) in enumerate(damages):
        with flipped(path, position), pytest.raises((CheckpointError, InputError), match=path.name):
            export(checkpoint, tmp_path / f"hf{number}", Wanted(load_check=False))
    with flipped(rank_file, max(entry.begin for name, entry in entries.items() if name.startswith("exp_avg/"))):
        export(checkpoint, tmp_path / "whole", Wanted(load_check=False))
    assert [path.name for path in tmp_path.glob("*hf*")] == []


@contextmanager
def flipped(path: Path, position: int) -> Iterator[None]:
    """One bit of a file is wrong meanwhile."""
    whole = path.read_bytes()
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
    yield
    path.write_bytes(whole)


def test_weights_that_are_read_out_of_order_are_verified_too(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    manifest = read_manifest(checkpoint)
    for names in (manifest.parameters, reversed(manifest.parameters), ["layer.weight"], []):
        reader = VerifiedWeights(checkpoint, manifest)
        for name in names:
            out = torch.empty(7 if name == "norm.weight" else 1, dtype=torch.bfloat16)
            reader.read_into("fp32", name, 0, out)
        reader.finish()
    (rank_file,) = checkpoint.glob("rank-*")
    begin = SafetensorsFile(rank_file).entries["fp32/norm.weight"].begin
    with flipped(rank_file, begin), pytest.raises(CheckpointError, match="is damaged"):
        VerifiedWeights(checkpoint, manifest).finish()


@pytest.mark.parametrize("moment", ["create", "write", "fsync"])
def test_a_checkpoint_that_is_deleted_meanwhile_is_named(moment: str, tmp_path: Path) -> None:
    """As a run in training does with its older ones."""
    checkpoint = checkpoint_of(tiny_model("llama"), tmp_path, {})
    with (
        at_first(moment, lambda: shutil.rmtree(checkpoint)),
        pytest.raises(CheckpointError, match=r"was deleted while"),
    ):
        export(checkpoint, tmp_path / "hf", Wanted(load_check=False))
    assert not list(tmp_path.glob("*hf*"))


def test_another_checkpoint_in_its_place_is_noticed(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tiny_model("llama"), tmp_path / "a", {})
    other = checkpoint_of(tiny_model("llama", seed=1), tmp_path / "b", {})

    def replace() -> None:
        shutil.rmtree(checkpoint)
        other.rename(checkpoint)

    with at_first("fsync", replace), pytest.raises(CheckpointError, match="replaced by another checkpoint"):
        export(checkpoint, tmp_path / "hf", Wanted(load_check=False, verify="sizes"))


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tiny_model("llama"), tmp_path, {})

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", None)

    with (
        at_first("write", fail),
        pytest.raises(CheckpointError, match=r"safetensors: No space left .* Nothing was published"),
    ):
        export(checkpoint, tmp_path / "hf", Wanted(load_check=False))
    assert not list(tmp_path.glob("*hf*"))


def test_what_a_killed_export_left_goes_at_the_next_start_once_it_is_old(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tiny_model("llama"), tmp_path, {})
    dead, alive, other = (tmp_path / name for name in (".hf.partial-0a", ".hf.partial-0b", ".other.partial-0c"))
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "model.safetensors").touch()
        for path in (folder / "model.safetensors", folder) if folder != alive else (folder,):
            os.utime(path, (time.time() - DEAD_SECONDS - 60,) * 2)
    export(checkpoint, tmp_path / "hf", Wanted(load_check=False))
    assert not dead.exists() and alive.exists() and other.exists()
