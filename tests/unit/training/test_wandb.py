"""The real wandb package, offline, its file read back; and how it is decided whether and where it logs."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_recipes.config.schema import LoggingConfig
from ds_recipes.training.trackers.background import BackgroundTracker
from ds_recipes.training.trackers.wandb_tracker import WandbTracker, run_id, wandb_mode

PROJECT = LoggingConfig(wandb_project="tests", wandb_entity="someone", wandb_name="a run")


@pytest.mark.parametrize(
    "logging, environment, netrc_text, mode",
    [
        (LoggingConfig(), {"WANDB_API_KEY": "k"}, None, None),
        (LoggingConfig(wandb_mode="online"), {}, None, "online"),
        (LoggingConfig(wandb_mode="offline"), {"WANDB_API_KEY": "k"}, None, "offline"),
        (LoggingConfig(wandb_project="p", wandb_mode="disabled"), {"WANDB_API_KEY": "k"}, None, None),
        (PROJECT, {}, None, "offline"),
        (PROJECT, {"WANDB_API_KEY": "k"}, None, "online"),
        (PROJECT, {"WANDB_API_KEY": ""}, None, "offline"),
        (PROJECT, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, None, "offline"),
        (PROJECT, {"WANDB_MODE": "disabled"}, None, None),
        (PROJECT, {}, "machine api.wandb.ai login user password k", "online"),
        (PROJECT, {"WANDB_BASE_URL": "https://own.example"}, "machine api.wandb.ai login user password k", "offline"),
        (PROJECT, {"WANDB_BASE_URL": "https://own.example"}, "machine own.example login user password k", "online"),
        (PROJECT, {}, "machine github.com login user password k", "offline"),
        (PROJECT, {}, "this is no netrc file", "offline"),
    ],
)
def test_where_a_run_logs_to(
    tmp_path: Path, logging: LoggingConfig, environment: dict[str, str], netrc_text: str | None, mode: str | None
) -> None:
    if netrc_text is not None:
        (tmp_path / ".netrc").write_text(netrc_text)
    assert wandb_mode(logging, environment, tmp_path) == mode


def test_a_run_folder_keeps_its_wandb_run(tmp_path: Path) -> None:
    assert run_id(tmp_path) == run_id(tmp_path)
    assert run_id(tmp_path) != run_id(tmp_path / "other")


LAUNCH = """
import sys
from pathlib import Path
from ds_recipes.config.schema import LoggingConfig
from ds_recipes.training.trackers.background import BackgroundTracker
from ds_recipes.training.trackers.wandb_tracker import WandbTracker

project = LoggingConfig(wandb_entity="someone", wandb_project="tests", wandb_name="a run")
settings = {"lr": 1e-4, "train_data": ("a",)}
tracker = BackgroundTracker("wandb", lambda: WandbTracker(project, "offline", Path(sys.argv[1]), settings), print)
for step in map(int, sys.argv[2:]):
    metrics = {"step": step, "loss": step / 3, "lr": 1e-4, "tokens_per_sec": 10.5, "mfu": None, "data_hash": "x"}
    tracker.log(step, metrics | {"variance_sqrt_l2": 0.25})
    tracker.evaluation(step, {"eval_loss": 2.0, "eval_perplexity": 7.4})
tracker.close()
"""


def test_an_offline_run_holds_what_was_logged_and_is_one_run_after_two_launches(tmp_path: Path) -> None:
    for steps in (("1", "2"), ("3",)):
        command = [sys.executable, "-c", LAUNCH, str(tmp_path), *steps]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert done.stdout == "", done.stdout
    runs = [list(wandb_records(path)) for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))]
    assert len(runs) == 2
    started = [record.run for records in runs for record in records if record.HasField("run")]
    assert {(run.run_id, run.entity, run.project, run.display_name) for run in started} == {
        (run_id(tmp_path), "someone", "tests", "a run")
    }
    config = {item.key: json.loads(item.value_json) for item in started[0].config.update}
    assert config["lr"] == 1e-4 and config["train_data"] == ["a"]
    history = [row for records in runs for row in history_rows(records)]
    assert [(row["_step"], row["training/loss"]) for row in history] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0)]
    assert history[0]["evaluation/val_loss"] == 2.0
    assert history[0]["optimizer/lr"] == 1e-4
    assert history[0]["optimizer/variance_sqrt_l2"] == 0.25
    assert history[0]["stats/tokens_per_sec"] == 10.5


def test_a_folder_that_cannot_be_written_costs_a_note(tmp_path: Path) -> None:
    blocked = tmp_path / "run"
    blocked.write_text("a file where a folder is due")
    notes: list[str] = []
    tracker = BackgroundTracker("wandb", lambda: WandbTracker(PROJECT, "offline", blocked, {}), notes.append)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert len(notes) == 1 and notes[0].startswith("wandb failed; the run goes on without it")


def history_rows(records: list) -> list[dict]:  # type: ignore[type-arg]
    rows = []
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def wandb_records(path: Path) -> Iterator:  # type: ignore[type-arg]
    """Records of a .wandb file: LevelDB's log (blocks of 32 KiB; crc, length, type) after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    block, data, at, parts = 32768, path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last of several
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""
