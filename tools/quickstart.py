"""Show the whole path on the embedded default: train, validate, stop, resume, export, generate.

    python tools/quickstart.py [--max_steps N]

`make quickstart` runs this. Every step is the command that a user would type. The run folder runs/quickstart is made
anew each time. Any step that fails, and a loss that does not clearly fall, ends this with a message and status 1.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_recipes.data.formats.alpaca import WITH_INPUT

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
RUN = Path("runs/quickstart")
EXPORT = RUN / "hf"
CONFIG = "examples/tiny_alpaca.yaml"
STEPS = 60
STOPPED_EARLY = 75  # exit status of a run that was asked to stop and has saved
CLEAR_FALL = 0.85  # the last losses' mean over the first losses' mean, at most
STEP_SECONDS = 600  # no single command may take longer
OWN_DATA = (
    "deepspeed --num_gpus N train.py --config examples/sft.yaml --model_name FOLDER_OR_HUB_ID --train_data FILE.jsonl "
    "--save_checkpoint_path runs/mine (examples/cpt.yaml to pretrain on documents)"
)


class Failed(Exception):
    """A step of the quickstart did not do what it should."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS})")
    steps = parser.parse_args().max_steps
    os.chdir(ROOT)
    started = time.monotonic()
    try:
        rows = run_all(steps)
    except Failed as failure:
        print(f"quickstart: {failure}", file=sys.stderr)
        return 1
    show(rows, time.monotonic() - started)
    return 0


def run_all(steps: int) -> dict[str, str]:
    """Every step in its order; returns the rows of the closing table."""
    shutil.rmtree(RUN, ignore_errors=True)
    train = train_command(steps)
    say("train, and stop half way (a file named STOP in the run folder)", train)
    train_until_stopped(train, steps // 2)
    say("the same command again resumes", train)
    run(train)
    checkpoint = RUN / f"iter_{steps:07d}"
    export = [sys.executable, "tools/convert_to_hf.py", "--ckpt", str(checkpoint), "--out", str(EXPORT)]
    say("export to Hugging Face's format", export)
    run(export)
    prompt = a_prompt()
    generate = [sys.executable, "tools/generate.py", str(EXPORT), "--prompt", prompt, "--max_new_tokens", "32"]
    say("generate with plain transformers", [*generate[:3], "--prompt", "...", *generate[5:]])
    return {
        **measured(steps),
        "checkpoint": str(checkpoint),
        "exported model": str(EXPORT),
        "sample": run(generate, capture=True),
    }


def train_command(steps: int) -> list[str]:
    launcher = [str(BIN / "deepspeed"), "--num_gpus", str(number_of_ranks()), "train.py", "--config", CONFIG]
    return [*launcher, "--max_steps", str(steps), "--save_checkpoint_path", str(RUN)]


def number_of_ranks() -> int:
    """Two, unless this machine has exactly one GPU."""
    listing = shutil.which("nvidia-smi") and subprocess.run(
        ["nvidia-smi", "--list-gpus"], capture_output=True, text=True
    )
    return 1 if listing and len(listing.stdout.splitlines()) == 1 else 2


def train_until_stopped(command: Sequence[str], step: int) -> None:
    """Start training, ask it to stop once `step` is logged, and see that it says so and has saved.

    Raises:
        Failed: it ended by itself, was too slow to stop, or has no checkpoint.
    """
    process = subprocess.Popen(command, env=environment())
    deadline = time.monotonic() + STEP_SECONDS
    while process.poll() is None and last_step() < step:
        if time.monotonic() > deadline:
            process.kill()
            raise Failed(f"step {step} was not reached in {STEP_SECONDS} s")
        time.sleep(0.2)
    if process.poll() is None:
        (RUN / "STOP").touch()
    try:
        status = process.wait(timeout=STEP_SECONDS)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise Failed(f"training did not stop within {STEP_SECONDS} s of the file STOP") from error
    if status != STOPPED_EARLY:
        raise Failed(f"training ended with status {status} where {STOPPED_EARLY} (stopped early, saved) was due")
    if not any(RUN.glob("iter_*/manifest.json")):
        raise Failed(f"{RUN} holds no checkpoint after a stop")


def run(command: Sequence[str], capture: bool = False) -> str:
    """Run one command to its end; its output if `capture`.

    Raises:
        Failed: it ended with another status than 0, or was too slow.
    """
    try:
        done = subprocess.run(
            command, env=environment(), stdout=subprocess.PIPE if capture else None, text=True, timeout=STEP_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{Path(command[0]).name} {command[1]} took longer than {STEP_SECONDS} s") from error
    if done.returncode:
        raise Failed(f"{' '.join(command)} ended with status {done.returncode}")
    return done.stdout or ""


def environment() -> dict[str, str]:
    """The launcher finds its own Python first; the ranks share the cores."""
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **os.environ, "PATH": path}


def metrics() -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, as far as it is written."""
    path = RUN / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step() -> int:
    return max((line["step"] for line in metrics() if "loss" in line), default=0)


def measured(steps: int) -> dict[str, str]:
    """What metrics.jsonl says of the run.

    Raises:
        Failed: a step is missing or stands there twice, there is no validation loss, or the loss did not clearly fall.
    """
    trained = [line for line in metrics() if "loss" in line]
    evaluated = [line["eval_loss"] for line in metrics() if "eval_loss" in line]
    if [line["step"] for line in trained] != list(range(1, steps + 1)):
        raise Failed(f"{RUN}/metrics.jsonl does not hold each of the {steps} steps once")
    if not evaluated:
        raise Failed("there is no validation loss")
    few = max(1, min(5, steps // 4))
    losses = [line["loss"] for line in trained]
    if not sum(losses[-few:]) < CLEAR_FALL * sum(losses[:few]):
        raise Failed(f"the loss did not clearly fall: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    speeds = sorted(line["tokens_per_sec"] for line in trained)
    return {
        "loss": f"{losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps",
        "validation loss": " -> ".join(f"{loss:.3f}" for loss in evaluated),
        "tokens per second": f"{speeds[len(speeds) // 2]:,.0f} (median step)",
    }


def a_prompt() -> str:
    """The prompt of the first validation record."""
    with Path("embedded/alpaca_validation.jsonl").open(encoding="utf-8") as file:
        record = json.loads(file.readline())
    return WITH_INPUT.format(**record)


def say(what: str, command: Sequence[str]) -> None:
    shown = " ".join(str(word).removeprefix(f"{BIN}{os.sep}") for word in command)
    print(f"\n== {what}\n   {shown}", flush=True)


def show(rows: dict[str, str], seconds: float) -> None:
    table = Table(title=f"quickstart: complete in {seconds:.0f} s", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value.strip() or "(nothing but the end of text)"))
    table.add_row("your own data", Text(OWN_DATA))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
