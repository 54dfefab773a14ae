"""What is said of an exported model by the process that loads it decides whether it is published; its index tells its size."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from safetensors.torch import load_file

from ds_recipes.checkpoint.export import check
from ds_recipes.checkpoint.export.pieces import Piece
from ds_recipes.checkpoint.export.sources import Source
from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.weights import WeightFiles
from ds_recipes.errors import CheckpointError
from ds_recipes.ranges import RangeReader

FINE: dict[str, Any] = {"missing": [], "unexpected": [], "mismatched": [], "other_tokens": "", "largest_logit": 10.0}


def checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **seen: Any) -> float:
    source = SimpleNamespace(probe=tmp_path / "probe", path=tmp_path, has_tokenizer=False, trained_in="float32")
    monkeypatch.setattr(check, "_load_afresh", lambda request: FINE | seen)
    return check.check_fresh_load(tmp_path, cast(Source, source), "float32", Wanted())


@pytest.mark.parametrize("difference", [float("nan"), float("inf"), 5.0])
def test_logits_that_are_others_or_no_numbers_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, difference: float
) -> None:
    with pytest.raises(CheckpointError, match="does not compute what was trained"):
        checked(monkeypatch, tmp_path, difference=difference)
    with pytest.raises(CheckpointError, match="does not compute what was trained"):
        checked(monkeypatch, tmp_path, difference=0.1, largest_logit=float("nan"))
    assert checked(monkeypatch, tmp_path, difference=0.0) == 0.0


@pytest.mark.parametrize(("key", "value"), [("missing", ["a"]), ("unexpected", ["a"]), ("mismatched", ["a"])])
def test_other_tensors_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, value: list[str]) -> None:
    with pytest.raises(CheckpointError, match=f"{key} a"):
        checked(monkeypatch, tmp_path, difference=0.0, **{key: value})


class Ramp:
    """A reader of parameters whose elements are their places."""

    buffers: ClassVar[dict[str, torch.Tensor]] = {}

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(torch.arange(start, start + out.numel()))


def test_the_index_of_several_files_tells_the_bytes_of_all_tensors(tmp_path: Path) -> None:
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 2)}
    pieces = [Piece(name, shape, name, ((0, torch.Size(shape).numel()),)) for name, shape in shapes.items()]
    names = WeightFiles(cast(RangeReader, Ramp()), "float32").write_model(tmp_path, pieces, max_shard_bytes=50)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = {name: tensor for file in names for name, tensor in load_file(tmp_path / file).items()}
    assert len(names) > 1 and tensors.keys() == shapes.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in tensors.values())
    assert all(torch.equal(tensor.reshape(-1), torch.arange(tensor.numel()).float()) for tensor in tensors.values())
