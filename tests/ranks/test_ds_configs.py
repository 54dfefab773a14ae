"""Every file of ds_configs/ through the whole train.py: the same losses as ZeRO-3's, and a stop that changes no bit."""

import json
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.config.async_io import missing_for_async_io
from tests.house.tree import ROOT
from tests.nano import make_nano
from tests.ranks.training import Ended, metrics, train

DS_CONFIGS = ROOT / "ds_configs"
STEPS = 4
HALF = STEPS // 2
EXACT = ("step", "loss", "lr", "grad_norm", "tokens", "data_hash")
SWAPPED = 13_200  # rows of a matrix whose halves are above the megabyte from which DeepSpeed swaps
BUILD_SECONDS = 600  # the first start with NVMe compiles asynchronous I/O
NO_ASYNC_IO = "asynchronous I/O cannot be built on this machine"


@dataclass(frozen=True)
class Use:
    """How a file is run: with these ranks, and these of its keys replaced."""

    file: str
    engine: str = "deepspeed"
    ranks: int = 2
    replaced: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.file}-{self.engine}"


GROUPS_OF_TWO = {"zero_hpz_partition_size": 2}  # of four ranks: a second copy that is not the first
USES = (
    Use("zero3"),
    Use("zero3_offload"),
    Use("zero3_hpz", ranks=4, replaced=GROUPS_OF_TWO),
    Use("zero3_nvme"),
    Use("zero2"),
    Use("zero1"),
    Use("zero3", "fsdp"),
    Use("zero3_offload", "fsdp"),
    Use("zero3_hpz", "fsdp", ranks=4, replaced=GROUPS_OF_TWO),
    Use("zero2", "fsdp"),
    Use("zero1", "fsdp"),
)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose model has matrices large enough for NVMe."""
    run_file = make_nano(tmp_path_factory.mktemp("nano"))
    config = json.loads((run_file.parent / "model" / "config.json").read_text())
    wide = run_file.parent / "wide.json"
    wide.write_text(json.dumps(config | {"intermediate_size": SWAPPED, "num_hidden_layers": 1}))
    text = run_file.read_text()
    for old, new in (
        ("model_name:", f"model_config: {wide}\ntokenizer_name:"),
        ("max_steps: 20", f"max_steps: {STEPS}"),
        ("save_interval_iteration: 10", f"save_interval_iteration: {HALF}"),
    ):
        assert old in text
        text = text.replace(old, new)
    run_file.write_text(text)
    return run_file


def ds_config(use: Use, folder: Path) -> Path:
    """The file itself, or a copy with what depends on the machine replaced."""
    path = DS_CONFIGS / f"{use.file}.json"
    tree = json.loads(path.read_text())
    zero = tree["zero_optimization"]
    zero |= use.replaced
    offloads = [
        zero[name] for name in ("offload_optimizer", "offload_param") if zero.get(name, {}).get("device") == "nvme"
    ]
    for section in offloads:
        section["nvme_path"] = str(folder)
    if tree == json.loads(path.read_text()):
        return path
    changed = folder / f"{use}.json"
    changed.write_text(json.dumps(tree))
    return changed


def launch(use: Use, nano: Path, folder: Path) -> Ended:
    nvme = nano.parent / "nvme"
    nvme.mkdir(exist_ok=True)
    argv = ("--config", str(nano), "--engine", use.engine, "--ds_config", str(ds_config(use, nvme)))
    ended = train(
        use.ranks,
        *argv,
        "--save_checkpoint_path",
        str(folder),
        outputs=nano.parent / f"outputs-{folder.name}",
        timeout=BUILD_SECONDS if use.file == "zero3_nvme" else 120,
    )
    assert ended.statuses == (0,) * use.ranks, ended.text
    return ended


@cache
def whole(use_number: int, nano: Path) -> Path:
    """The run folder of an uninterrupted run, with checkpoints at its half and at its end."""
    use = USES[use_number]
    folder = nano.parent / f"whole-{use}"
    launch(use, nano, folder)
    return folder


def exact_lines(folder: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT} for _, line in sorted(metrics(folder).items())]


EVERY_DAY = ("zero2-deepspeed", "zero3-deepspeed", "zero3-fsdp", "zero3_nvme-deepspeed")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id=str(use), marks=() if str(use) in EVERY_DAY else pytest.mark.slow)
        for number, use in enumerate(USES)
    ],
)
def test_it_trains_as_zero3_does_and_goes_on_bit_for_bit(number: int, nano: Path, tmp_path: Path) -> None:
    use = USES[number]
    if use.file == "zero3_nvme" and missing_for_async_io():
        pytest.skip(NO_ASYNC_IO)
    lines = exact_lines(whole(number, nano))
    assert lines[-1]["loss"] < lines[0]["loss"]
    for mine, zero3 in zip(lines, exact_lines(whole(0, nano)), strict=True):
        assert mine["loss"] == pytest.approx(zero3["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(zero3["grad_norm"], rel=1e-4)
        assert mine["data_hash"] == zero3["data_hash"]

    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(whole(number, nano) / f"iter_{HALF:07d}", resumed / f"iter_{HALF:07d}")
    launch(use, nano, resumed)
    after = exact_lines(resumed)
    assert after[0] == lines[HALF], "the first step after the stop"
    assert after == lines[HALF:]


def test_every_file_is_run() -> None:
    assert {path.stem for path in DS_CONFIGS.glob("*.json")} == {use.file for use in USES if use.engine == "deepspeed"}
