"""Folders of torch.distributed.checkpoint, read without running their pickles: whatever was saved comes back, range by range."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ds_recipes.checkpoint.export.sources import open_source
from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.whole import export
from ds_recipes.checkpoint.native import find_distributed, open_distributed
from ds_recipes.errors import InputError
from ds_recipes.ranges import RangeReader
from tests.nano import make_nano
from tests.ranks.launch import run_ranks
from tests.unit.checkpoint.test_native_pickles import HOSTILE
from tests.unit.models.tiny import tiny_model


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (13, 6), "experts.up": (3, 8, 5), "norm.weight": (7,), "scale": (), "none": (0, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=str(folder))
    return folder


def whole(reader: RangeReader, name: str, step: int = 7) -> torch.Tensor:
    flat = torch.empty(torch.Size(reader.shape(name)).numel())
    for start in range(0, flat.numel(), step):
        reader.read_into("fp32", name, start, flat[start : start + step])
    return flat.reshape(reader.shape(name))


def assert_holds(reader: RangeReader, expected: dict[str, torch.Tensor]) -> None:
    assert sorted(reader.names) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(whole(reader, name), tensor.float()), name


WRAPPED: dict[str, Any] = {
    "Accelerate and the Trainer": lambda state: {"model": state},
    "with an optimizer": lambda state: {
        "model": state,
        "optimizer": {"state": {"a": {"exp_avg": torch.ones(3)}}},
        "step": 4,
    },
    "the tutorial's AppState": lambda state: {"app": {"model": state, "optim": {"x": torch.ones(2)}}},
    "nothing around it": lambda state: state,
    "beside an optimizer": lambda state: {**state, "optimizer.a": torch.ones(2)},
    "Lightning's": lambda state: {"state_dict": state, "epoch": 3},
    "names of wrappers": lambda state: {"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("program", WRAPPED)
def test_the_model_is_found_whatever_was_saved_around_it(program: str, tmp_path: Path) -> None:
    reader = open_distributed(save(tmp_path / "saved", WRAPPED[program](tensors())))
    assert_holds(reader, tensors())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    reader = open_distributed(save(tmp_path / "saved", {"model": state}))
    assert reader.trained_in == str(dtype).removeprefix("torch.")
    assert_holds(reader, state)


def save_sharded(world: Any, folder: str) -> None:
    """Each tensor of two dimensions along the first, along the second, and along both; uneven ones too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    state = tensors()
    placed = {
        "embed.weight": distribute_tensor(state["embed.weight"], line, [Shard(0)]),
        "experts.up": distribute_tensor(state["experts.up"], grid, [Shard(0), Shard(1)]),
        "norm.weight": distribute_tensor(state["norm.weight"], grid, [Shard(0), Replicate()]),
        "columns": distribute_tensor(state["embed.weight"], line, [Shard(1)]),
        "last": distribute_tensor(state["experts.up"], grid, [Shard(2), Replicate()]),
    }
    dcp.save({"model": placed}, checkpoint_id=folder)


def test_the_chunks_of_all_ranks_are_put_together(tmp_path: Path) -> None:
    run_ranks(save_sharded, 4, str(tmp_path / "saved"), with_deepspeed=False)
    state = tensors()
    expected = {name: state[name] for name in ("embed.weight", "experts.up", "norm.weight")}
    expected |= {"columns": state["embed.weight"], "last": state["experts.up"]}
    assert len(list((tmp_path / "saved").glob("*.distcp"))) == 4
    assert_holds(open_distributed(tmp_path / "saved"), expected)
    (tmp_path / "saved" / "__2_0.distcp").unlink()
    with pytest.raises(InputError, match=r"__2_0\.distcp is missing, which holds a part of the model"):
        open_distributed(tmp_path / "saved")


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor of 32 MB a few values, from anywhere."""
    large = torch.arange(8 << 20, dtype=torch.float32)
    reader = open_distributed(save(tmp_path / "saved", {"model": {"large": large}}))
    read = 0

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal read
        count = plain(descriptor, buffers, offset)
        read += count
        return count

    plain = os.preadv
    monkeypatch.setattr(os, "preadv", counted)
    for start in (0, 12_345, large.numel() - 5):
        out = torch.empty(5)
        reader.read_into("fp32", "large", start, out)
        assert torch.equal(out, large[start : start + 5])
    assert read < 20_000


def test_a_folder_of_the_trainer_becomes_a_model(tmp_path: Path) -> None:
    """Config and tokenizer beside it, an optimizer's folder that is left alone; then without any tokenizer."""
    make_nano(tmp_path)
    model = tiny_model("llama")
    place = tmp_path / "checkpoint-30"
    save(place / "pytorch_model_fsdp_0", {"model": model.state_dict()})
    save(place / "optimizer_0", {"optimizer": {"x": torch.ones(3)}})
    model.config.save_pretrained(place)
    made = export(place, tmp_path / "bare")
    assert made.difference is not None and made.difference < 1e-6
    assert any("no tokenizer lies with the checkpoint" in note for note in made.notes)
    for file in (tmp_path / "model").glob("tokenizer*"):
        (place / file.name).write_bytes(file.read_bytes())
    made = export(place / "pytorch_model_fsdp_0", tmp_path / "hf", Wanted(load_check=False))
    assert (tmp_path / "hf" / "tokenizer.json").exists() and not made.notes
    with pytest.raises(InputError, match=r"one rank's share of a model.*--ckpt \S+pytorch_model_fsdp_0$"):
        open_source(place / "pytorch_model_fsdp_0" / "__0_0.distcp", Wanted())


@pytest.mark.parametrize("name", HOSTILE)
def test_no_code_of_the_table_or_of_a_tensor_runs(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = save(tmp_path / "saved", {"model": tensors()})
    table = pickle.loads((folder / ".metadata").read_bytes())
    table.planner_data["hostile"] = HOSTILE[name](str(canary))
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(
        InputError, match=rf"\.metadata: to read it, (builtins\.)?{name} would have to be called.*trust_pickle"
    ):
        open_distributed(folder)
    del table.planner_data["hostile"]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("archive/data.pkl", pickle.dumps(HOSTILE[name](str(canary))))
    (folder / "__0_0.distcp").write_bytes(archive.getvalue())
    for index, info in table.storage_data.items():
        table.storage_data[index] = type(info)("__0_0.distcp", 0, len(archive.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(InputError, match=rf"to read it, (builtins\.)?{name} would have to be called"):
        whole(open_distributed(folder), "norm.weight")
    assert not canary.exists()


def test_a_file_outside_and_a_table_that_lies_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", {"model": tensors()})
    original = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in original.storage_data if index.fqn == "model.embed.weight")
    info = original.storage_data[index]
    (tmp_path / "secret").write_bytes((folder / "__0_0.distcp").read_bytes())
    for path, begin, said in (
        ("../secret", info.offset, "not a file of this folder"),
        ("__0_0.distcp", info.offset + 1, "is not a tensor as torch.save writes it"),
        ("__0_0.distcp", 1 << 40, "cut short"),
    ):
        original.storage_data[index] = type(info)(path, begin, info.length)
        (folder / ".metadata").write_bytes(pickle.dumps(original))
        with pytest.raises(InputError, match=said):
            whole(open_distributed(folder), "embed.weight")
    original.state_dict_metadata["model.embed.weight"].size = torch.Size((14, 6))
    (folder / ".metadata").write_bytes(pickle.dumps(original))
    with pytest.raises(InputError, match=r"embed\.weight has 84 elements, 78 were saved"):
        open_distributed(folder)
    (folder / ".metadata").write_bytes(b"\x80\x04K\x03.")
    with pytest.raises(InputError, match=r"not a table of torch\.distributed\.checkpoint"):
        open_distributed(folder)


def test_of_several_one_has_to_be_named(tmp_path: Path) -> None:
    for name in ("step1", "step2"):
        save(tmp_path / name, {"model": tensors()})
    with pytest.raises(InputError, match=r"\(step1, step2\)\. Name one of them"):
        find_distributed(tmp_path)
    assert find_distributed(tmp_path / "step1") == tmp_path / "step1"
