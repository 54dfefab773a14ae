"""Both engines on one GPU: they agree in every precision, continue each other, and fp16 finds its loss scale."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 400
ENGINES = ("deepspeed", "fsdp")
GROUPS = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="groups of ranks need two GPUs: on one there is one group"
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use"),
]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default, made here: a GPU machine need not have run `make setup`."""
    folder = tmp_path_factory.mktemp("default") / "embedded"
    assert run(["tools/embedded_default.py", str(folder)])[0] == 0
    return folder


def run(arguments: list[str], ranks: int = 0) -> tuple[int, str]:
    """Run a program of the project, under torchrun where `ranks` are asked for; its status and output."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks else []
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    return done.returncode, done.stdout


def settings(embedded: Path, folder: Path, *flags: str) -> list[str]:
    return [
        *("--model_name", str(embedded / "model"), "--dataset", "alpaca", "--context_size", "256"),
        *("--train_data", str(embedded / "alpaca.jsonl"), "--batch_size_training", "6", "--global_batch_size", "12"),
        *(
            "--lr",
            "1e-4",
            "--max_steps",
            "40",
            "--save_interval_iteration",
            "20",
            "--save_checkpoint_path",
            str(folder),
        ),
        *flags,
    ]


def train(embedded: Path, folder: Path, *flags: str, ranks: int = 1) -> str:
    status, output = run(["train.py", *settings(embedded, folder, *flags)], ranks)
    assert status == 0, output
    return output


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines_of(folder, "metrics.jsonl") if "loss" in line}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_engines_agree(embedded: Path, tmp_path: Path, precision: str) -> None:
    flags = ["--precision", precision, "--steps", "20", "--output", str(tmp_path / "it.json")]
    status, output = run(["tools/compare_engines.py", *settings(embedded, tmp_path / "run", *flags)], ranks=1)
    assert status == 0 and "the engines agree" in output, output
    one, other = json.loads((tmp_path / "it.json").read_text())["engines"]
    assert one["memory_gib"] > 0 and other["memory_gib"] > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_fp16_overflow_steps_are_reported_and_the_run_learns(embedded: Path, tmp_path: Path, engine: str) -> None:
    """From a scale of 2**32 the first steps overflow; the learning rate waits for them."""
    tree = {"zero_optimization": {"stage": 3}, "fp16": {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}}
    path = tmp_path / "fp16.json"
    path.write_text(json.dumps(tree))
    flags = ("--engine", engine, "--precision", "fp16", "--ds_config", str(path), "--lr_warmup", "10")
    train(embedded, tmp_path / "run", *flags)
    overflows = [line for line in lines_of(tmp_path / "run", "events.jsonl") if line["kind"] == "overflow"]
    assert overflows and overflows[0]["loss_scale"] == 2.0**32
    metrics = {line["step"]: line for line in lines_of(tmp_path / "run", "metrics.jsonl") if "loss" in line}
    skipped = {event["step"] for event in overflows}
    assert metrics[40]["loss_scale"] < 2.0**32 and metrics[40]["loss"] < metrics[1]["loss"]
    done = 0
    for step, line in sorted(metrics.items()):
        if done < 10:
            assert line["lr"] == pytest.approx(1e-4 * (done + 1) / 11, rel=1e-6), step
        done += step not in skipped


@pytest.mark.parametrize("saved_by, by", [ENGINES, ENGINES[::-1]])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_each_engine_continues_the_others_checkpoint(
    embedded: Path, tmp_path: Path, saved_by: str, by: str, precision: str
) -> None:
    train(embedded, tmp_path / "whole", "--engine", saved_by, "--precision", precision)
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "iter_0000020", folder / "iter_0000020")
    train(embedded, folder, "--engine", by, "--precision", precision)
    mine, theirs = losses(folder), losses(tmp_path / "whole")
    assert sorted(mine) == list(range(21, 41))
    for step in mine:
        assert mine[step] == pytest.approx(theirs[step], abs=1e-2)


@GROUPS
@pytest.mark.parametrize("engine", ENGINES)
def test_groups_of_ranks_train_as_all_together(embedded: Path, tmp_path: Path, engine: str) -> None:
    """hpZ of ZeRO, HSDP of FSDP2: another layout of the same run."""
    path = tmp_path / "groups.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    flags = ("--engine", engine, "--precision", "fp32")
    for name, more in (("groups", ("--ds_config", str(path))), ("together", ())):
        status, output = run(["train.py", *settings(embedded, tmp_path / name, *flags, *more)], ranks=2)
        assert status == 0, output
    one, other = losses(tmp_path / "groups"), losses(tmp_path / "together")
    for step in one:
        assert one[step] == pytest.approx(other[step], abs=1e-4)
