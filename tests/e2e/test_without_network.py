"""A whole run where there is no network interface but loopback: nothing waits for one, and the losses are the usual ones."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launchers import ROOT, command, run
from tests.e2e.test_launchers import EXACT
from tests.nano import make_nano
from tests.ranks.training import metrics, train

ALONE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


def can_be_alone() -> bool:
    return os.geteuid() == 0 and subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_be_alone(), reason="a network of its own needs root")


def exact_lines(folder: Path) -> dict[int, list[Any]]:
    return {step: [line[key] for key in EXACT] for step, line in metrics(folder).items()}


@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_it_trains_evaluates_saves_and_goes_on(engine: str, tmp_path: Path) -> None:
    nano = make_nano(tmp_path / "nano")

    def flags(folder: str, steps: int) -> list[str]:
        own = ["--save_checkpoint_path", str(tmp_path / folder), "--max_steps", str(steps), "--engine", engine]
        constant = [
            "--lr_warmup",
            "0",
            "--lr_decay_style",
            "constant",
            "--eval_interval",
            "2",
            "--save_interval_iteration",
            "2",
        ]
        return ["--config", str(nano), *own, *constant]

    seen = subprocess.run([*ALONE, "ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert [line.split()[0] for line in seen if line] == ["lo"]
    for steps in (2, 4):
        ended = run([*ALONE, *command("torchrun", 2, ROOT / "train.py", *flags("alone", steps))])
        assert ended.status == 0, ended.output
    usual = train(2, *flags("usual", 4), outputs=tmp_path / "outputs")
    assert usual.statuses == (0, 0), usual.text
    assert (
        exact_lines(tmp_path / "alone") == exact_lines(tmp_path / "usual") and len(exact_lines(tmp_path / "usual")) == 4
    )
    evaluated = metrics(tmp_path / "alone", "eval_loss")
    assert evaluated.keys() == {2, 4}
    assert json.loads((tmp_path / "alone" / "run.json").read_text())["state"] == "complete"
