"""Pickles from elsewhere: none of their code runs, and what would need it is refused by name."""

import argparse
import builtins
import io
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_recipes.checkpoint.native import open_deepspeed, open_full_state
from ds_recipes.checkpoint.native.pickles import Inert, load_pickle
from ds_recipes.errors import InputError


class Calls:
    """Pickled, a call of `function` with these arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def touch(canary: str) -> None:
    Path(canary).touch()


HOSTILE: dict[str, Callable[[str], Any]] = {
    "posix.system": lambda canary: Calls(os.system, f"touch {canary}"),
    "eval": lambda canary: Calls(builtins.eval, f"open({canary!r}, 'w')"),
    "exec": lambda canary: Calls(builtins.exec, f"open({canary!r}, 'w')"),
    f"{__name__}.touch": lambda canary: Calls(touch, canary),
    "io.open": lambda canary: Calls(io.open, canary, "w"),
    r"\S+\.Popen": lambda canary: Calls(subprocess.Popen, ["touch", canary]),
}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    hostile = HOSTILE[name](str(canary))
    file = save(tmp_path / "model.pt", {"weight": torch.ones(3), "payload": hostile})
    with pytest.raises(InputError, match=rf"model.pt: to read it, {name}.*trust_pickle"):
        open_full_state(file)
    folder = tmp_path / "global_step1"
    folder.mkdir()
    save(folder / "mp_rank_00_model_states.pt", {"module": {"weight": torch.ones(3)}, "payload": hostile})
    with pytest.raises(InputError, match="trust_pickle"):
        open_deepspeed(folder)
    assert not canary.exists()


def test_trusted_it_runs(tmp_path: Path) -> None:
    """So that the canary of the other test is one that sings."""
    canary = tmp_path / "canary"
    file = save(tmp_path / "model.pt", {"weight": torch.ones(3), "payload": HOSTILE["posix.system"](str(canary))})
    load_pickle(file, trust=True)
    assert canary.exists()


def test_placeholders_do_nothing(tmp_path: Path) -> None:
    """The names that are let through stand for a class of ours, whatever they are called with."""
    given = {"args": argparse.Namespace(lr=3), "loss": np.float64(2), "random": np.arange(3), "here": tmp_path}
    content = load_pickle(save(tmp_path / "a.pt", {**given, "x": torch.ones(2)}), trust=False)
    assert {type(content[name]) for name in given} == {Inert} and content["args"].lr == 3
    assert torch.equal(content["x"], torch.ones(2))


def in_an_archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    return path


def truncated(path: Path) -> Path:
    data = save(path, {"weight": torch.ones(1000)}).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def old_format(path: Path) -> Path:
    torch.save({"weight": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    return path


def empty(path: Path) -> Path:
    path.touch()
    return path


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (truncated, "cut short, damaged"),
    "before torch 1.6": (old_format, "before torch 1.6.*torch.save"),
    "empty": (empty, "cut short, damaged"),
    "no pickle": (lambda path: in_an_archive(path, b"not a pickle"), "cannot be read"),
    "a bomb": (
        lambda path: in_an_archive(path, bytes(300 << 20), zipfile.ZIP_DEFLATED),
        "compressed or has 314,572,800 bytes",
    ),
    "protocol 4": (lambda path: in_an_archive(path, pickle.dumps({"a": touch}, protocol=4)), "cannot be read"),
    "a list": (lambda path: save(path, [1, 2]), "holds list, and no state_dict"),
    "a number": (lambda path: save(path, {"step": 7, "model": {}}), "a dictionary of step, model, and no state_dict"),
    "no tensor": (lambda path: save(path, {"w": torch.ones(2), "v": 3}), "v is a int, not a plain tensor"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    make, expected = UNREADABLE[name]
    with pytest.raises(InputError, match=f"(?s)model.pt: .*{expected}"):
        open_full_state(make(tmp_path / "model.pt"))


def test_a_storage_that_is_too_short_is_refused(tmp_path: Path) -> None:
    """A pickle that claims more elements than its file holds must not read what lies behind."""
    good = save(tmp_path / "good.pt", {"weight": torch.arange(1000.0)})
    with zipfile.ZipFile(good) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data[:-800] if name.endswith("data/0") else data)
    with pytest.raises(InputError, match=r"model\.pt"):
        reader = open_full_state(tmp_path / "model.pt")
        out = torch.empty(1000)
        reader.read_into("fp32", "weight", 0, out)
