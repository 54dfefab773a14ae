"""One file with a whole state_dict, as torch.save writes it, read as ranges."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.checkpoint.native import open_full_state
from ds_recipes.ranges import RangeReader


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    embedding = torch.randn(11, 6)
    return {
        "model.embed.weight": embedding,
        "model.turned.weight": torch.randn(5, 7).T,
        "model.half.weight": torch.randn(4, 3).bfloat16(),
        "model.scale": torch.tensor(2.5),
        "lm_head.weight": embedding,
    }


def whole(reader: RangeReader, name: str, step: int = 5) -> torch.Tensor:
    flat = torch.empty(torch.Size(reader.shape(name)).numel())
    for start in range(0, flat.numel(), step):
        reader.read_into("fp32", name, start, flat[start : start + step])
    return flat.reshape(reader.shape(name))


WRAPPED: dict[str, Any] = {
    "as it is": lambda state: state,
    "model": lambda state: {"model": state, "step": 3},
    "state_dict": lambda state: {"state_dict": state, "epoch": 1},
    "data parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled in data parallel": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "FSDP": lambda state: {"model": {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_every_tensor_is_read_by_ranges(tmp_path: Path, name: str) -> None:
    state = tensors()
    torch.save(WRAPPED[name](state), tmp_path / "model.pt")
    reader = open_full_state(tmp_path / "model.pt")
    assert reader.tied == {"lm_head.weight": "model.embed.weight"}
    assert {*reader.names, *reader.tied} == state.keys() and reader.trained_in == "float32"
    for tensor_name, tensor in state.items():
        assert torch.equal(whole(reader, tensor_name), tensor.float()), tensor_name
    assert reader.has("fp32") and not reader.has("exp_avg")
    with pytest.raises(IndexError):
        reader.read_into("fp32", "model.scale", 1, torch.empty(1))


def test_a_prefix_that_not_all_names_have_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "model.pt")
    assert open_full_state(tmp_path / "model.pt").names == ["module.a", "b"]


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def test_nothing_of_a_large_file_is_held_in_memory(tmp_path: Path) -> None:
    """A tensor of 160 MB that lies in order, and one of 80 MB that does not."""
    torch.save({"a": torch.ones(40_000_000), "b": torch.ones(5_000, 4_000).T}, tmp_path / "model.pt")
    buffer = torch.empty(1_000_000, dtype=torch.bfloat16)
    before = anonymous_bytes()
    reader = open_full_state(tmp_path / "model.pt")
    most = anonymous_bytes()
    for name in reader.names:
        for start in range(0, torch.Size(reader.shape(name)).numel(), buffer.numel()):
            reader.read_into("fp32", name, start, buffer)
            most = max(most, anonymous_bytes())
    assert most - before < 30e6
