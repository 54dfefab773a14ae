"""A flipped bit of what ranks hold alike, and a product that comes out otherwise a second time: found before the next save."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.nano import make_nano
from tests.ranks.corrupted import VARIABLE, corrupted
from tests.ranks.training import Ended, metrics, train

STEPS = 6


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout: a check that took random numbers would change the losses."""
    return make_nano(tmp_path_factory.mktemp("nano"), dropout=0.1)


def run(nano: Path, folder: Path, ranks: int, ds: dict[str, Any], *more: str, steps: int = STEPS, **how: Any) -> Ended:
    """Some steps with a save after every second one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ds.json").write_text(json.dumps(ds))
    flags = [
        "--config",
        str(nano),
        "--save_checkpoint_path",
        str(folder / "run"),
        "--ds_config",
        str(folder / "ds.json"),
    ]
    length = ["--max_steps", str(steps), "--save_interval_iteration", "2", "--run_validation", "false"]
    return train(ranks, *flags, *length, *more, outputs=folder / "outputs", **how)


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


KINDS = {
    # what goes wrong: the engine, its JSON, ranks, the rank and what is said of it
    "a buffer under ZeRO-3": ("buffer", "deepspeed", zero(3), 3, 1, "differs in the buffer "),
    "a persistent parameter of ZeRO-3": ("parameter", "deepspeed", zero(3), 3, 1, "differs in model."),
    "a parameter of ZeRO-2": ("parameter", "deepspeed", zero(2), 3, 2, "differs in model."),
    "a replica of HSDP": ("replica", "fsdp", zero(3, zero_hpz_partition_size=2), 4, 3, "right cannot be told"),
    "a product under FSDP2": ("product", "fsdp", zero(3), 2, 1, "that was run twice"),
    "a product under ZeRO-3": ("product", "deepspeed", zero(3), 2, 0, "that was run twice"),
    "a buffer under FSDP2": ("buffer", "fsdp", zero(3), 3, 0, "differs in the buffer "),
}


BESIDES = ("a buffer under FSDP2", "a parameter of ZeRO-2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in BESIDES else ()) for name in KINDS]
)
def test_what_differs_is_named_and_nothing_is_saved_any_more(nano: Path, tmp_path: Path, name: str) -> None:
    kind, engine, ds, ranks, wrong, said = KINDS[name]
    env = {VARIABLE: f"{kind} rank={wrong} step=4"}
    flags = ("--engine", engine, "--checksum_interval", "100")  # so only the steps of saves are checked
    ended = run(nano, tmp_path, ranks, ds, *flags, env=env, program=corrupted)
    assert ended.statuses == (1,) * ranks, ended.text
    assert ended.text.count("the checksum of step 4 found that") == 1 and said in ended.text, ended.text
    assert f"rank {wrong} ({os.uname().nodename}, cpu)" in ended.text and "step 2 passed" in ended.text, ended.text
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000002"]
    assert json.loads((folder / "iter_0000002" / "state.json").read_text())["checksum_step"] == 2
    assert json.loads((folder / "run.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_run_that_is_checked_is_the_run_that_is_not(nano: Path, tmp_path: Path, engine: str) -> None:
    """Bit for bit, with dropout and activation checkpointing."""
    shared = ("--engine", engine, "--activation_checkpointing")
    for folder, interval in (("checked", "1"), ("not", "0")):
        ended = run(nano, tmp_path / folder, 2, zero(3), *shared, "--checksum_interval", interval)
        assert ended.statuses == (0, 0), ended.text
    exact = ("loss", "grad_norm", "lr", "data_hash")
    checked, plain = (metrics(tmp_path / folder / "run") for folder in ("checked", "not"))
    assert [[line[key] for key in exact] for line in checked.values()] == [
        [line[key] for key in exact] for line in plain.values()
    ]
    last = [tmp_path / folder / "run" / f"iter_{STEPS:07d}" for folder in ("checked", "not")]
    for file in last[0].glob("rank-*.safetensors"):
        assert file.read_bytes() == (last[1] / file.name).read_bytes()
    states = [json.loads((folder / "state.json").read_text()) for folder in last]
    assert [state["checksum_step"] for state in states] == [STEPS, None]
    assert states[0]["rng"] == states[1]["rng"]


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_training_without_float32_masters_is_told_and_recorded(nano: Path, tmp_path: Path, engine: str) -> None:
    ds = zero(3) | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    ended = run(nano, tmp_path, 1, ds, "--engine", engine, "--precision", "bf16", steps=1)
    assert ended.statuses == (0,), ended.text
    assert "warning: bfloat16 (no float32 master weights" in ended.text
    entry = json.loads((tmp_path / "run" / "run.json").read_text())["launches"][-1]
    assert entry["precision"]["master"] == "bfloat16" and entry["pure_low_precision"] is True
    usual = run(nano, tmp_path / "usual", 1, zero(3), "--engine", engine, "--precision", "bf16", steps=1)
    assert usual.statuses == (0,) and "no float32 master weights" not in usual.text, usual.text
    entry = json.loads((tmp_path / "usual" / "run" / "run.json").read_text())["launches"][-1]
    assert entry["precision"]["master"] == "float32" and entry["pure_low_precision"] is False
