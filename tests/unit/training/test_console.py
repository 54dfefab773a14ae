"""What the screen shows, on a terminal, in a file, and when nobody reads any more."""

import io
import os
import pty
import subprocess
import sys
import time
from typing import Any

import pytest

from ds_recipes.training.trackers.console import Console

METRICS: dict[str, Any] = {
    "loss": 6.432230123,
    "lr": 1e-4,
    "grad_norm": 1.5,
    "tokens_per_sec": 12345.6,
    "mfu": 0.4123,
    "data_hash": "ab",
}


def test_one_plain_line_a_step_with_the_time_left() -> None:
    now = [0.0]
    out = io.StringIO()
    console = Console(100, 10, out, clock=lambda: now[0])
    now[0] = 20.0
    console.log(20, METRICS)
    assert out.getvalue() == (
        "step  20/100  loss 6.432230  lr 1.000e-04  grad norm 1.500000  tokens/s 12,346  mfu 41.2%  eta 0:02:40\n"
    )


def test_the_time_left_is_counted_from_where_the_run_went_back_to() -> None:
    now = [0.0]
    out = io.StringIO()
    console = Console(100, 0, out, clock=lambda: now[0])
    now[0] = 1000.0
    console.rewind(40, 90)
    now[0] = 1010.0
    console.log(50, METRICS)
    assert out.getvalue().startswith("step 50/90  ") and out.getvalue().endswith("eta 0:00:40\n")


def test_unknown_numbers_are_left_out_and_events_show_their_message() -> None:
    out = io.StringIO()
    console = Console(9, 0, out)
    console.log(1, METRICS | {"mfu": None, "tokens_per_sec": None})
    console.evaluation(1, {"eval_loss": 2.5})
    console.event("skipped_step", {"step": 1, "grad_norm": "inf"})
    console.event("saved", {"message": "iter_0000001 in 0.2 s", "step": 1})
    console.close()
    lines = out.getvalue().splitlines()
    assert "mfu" not in lines[0] and "tokens/s" not in lines[0]
    assert lines[1:] == [
        "evaluation after step 1: eval_loss 2.500000",
        "skipped step: step 1  grad_norm inf",
        "saved: iter_0000001 in 0.2 s",
    ]


def test_a_terminal_gets_a_bar_with_the_numbers() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        console = Console(4, 0, terminal)
        console.log(2, METRICS)
        console.event("saved", {"message": "[iter_2]"})
        console.close()
        time.sleep(0.05)
        shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "2/4" in shown and "6.432230" in shown and "[iter_2]" in shown


def test_below_mpirun_a_pseudo_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open MPI gives rank 0 one even where a job's output goes to a file: a bar would fill the file."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        console = Console(4, 0, terminal)
        console.log(2, METRICS)
        console.close()
        shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert shown.startswith("step 2/4  loss 6.432230") and "\x1b" not in shown


@pytest.mark.parametrize("closed", [False, True])
def test_a_reader_that_went_away_does_not_change_the_exit_status(closed: bool) -> None:
    program = (
        "import sys, time\n"
        "from ds_recipes.training.trackers.console import Console\n"
        "console = Console(2000, 0, sys.stdout)\n"
        "for step in range(1, 2001):\n"
        "    console.log(step, {'loss': 1.0})\n"
        "console.close()\n"
        "print('alive', file=sys.stderr)\n"
        "sys.exit(7)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stderr is not None
    run.stdout.readline()
    if closed:
        run.stdout.close()
    else:
        run.stdout.read()
    errors = run.stderr.read()
    assert run.wait(30) == 7
    assert errors == "alive\n"
