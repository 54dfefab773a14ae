"""What an optimizer step of our training loop costs, beside the barest DeepSpeed loop, in one run.

    python benchmarks/step_overhead.py

Starts 2 ranks (gloo, CPU) by torchrun. In the same processes three sides take turns of 2 steps each, on the same rows.
Ours is `training/loop.py` itself on the embedded model (hidden size 256): the stream assembles rows, counts are summed
over ranks, every step is logged to metrics.jsonl and the screen, the state's norms every 10 steps. The barest loop is

    loss = engine(**batch).loss; engine.backward(loss); engine.step()

on the same Hugging Face model from the same weights, with the same JSON, rows made ahead (outside its time) and torch's
fused AdamW. It logs nothing, sums nothing and schedules nothing, so whatever our loop does besides is ours to pay.
Every row is full and nearly every token is a target, so that both compute the loss at the same places; ours also has
the targets that lie in the next row. The losses printed, of the first step and the last, agree but for these.

- `native`: the barest loop with the loss that transformers computes from `labels`: what a user would compare with.
- `same_loss`: the barest loop with our loss head, which differs from ours in the loop and the engine's class alone.

A block is 10 steps of each side. Prints the median over blocks of ours / theirs, with quartiles, and the same of rank
0's CPU time, which other programs disturb less. Exit status 1 if the wall-clock median is above 1.02 for either peer.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bare_loop import BareLoop
from ds_recipes.config.ds.effective import effective_ds_config
from ds_recipes.config.load import load_config
from ds_recipes.data.batch import MicroBatch
from ds_recipes.data.stream import Stream
from ds_recipes.training.launch import open_launch
from ds_recipes.training.loop import train
from ds_recipes.training.run import Run
from ds_recipes.training.start import prepare
from ds_recipes.world.resolve import resolve

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = 1.02
PEERS = ("native", "same_loss")
LR = 3e-4
CONTEXT = 256
TIME_LIMIT_SECONDS = 1800


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4, help="rows a rank a micro-step")
    parser.add_argument("--micro_steps", type=int, default=1, help="micro-steps an optimizer step")
    parser.add_argument(
        "--turn", type=int, default=2, help="optimizer steps of one side until it is the next one's turn"
    )
    parser.add_argument("--block", type=int, default=10, help="optimizer steps of each side in a block, whole turns")
    parser.add_argument("--blocks", type=int, default=14, help="measured blocks, after one to warm up")
    parser.add_argument("--json", help="write the result to this file too")
    parser.add_argument("--rank_folder", help=argparse.SUPPRESS)  # set for the ranks that this program starts
    arguments = parser.parse_args()
    if arguments.rank_folder:
        return measure_on_this_rank(arguments, Path(arguments.rank_folder))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        make_default = [sys.executable, str(ROOT / "tools" / "embedded_default.py"), str(folder / "embedded")]
        subprocess.run(make_default, check=True, timeout=TIME_LIMIT_SECONDS, env=environment)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(arguments.ranks)]
        command = [*launcher, __file__, *sys.argv[1:], "--rank_folder", name]
        with (folder / "log.txt").open("w") as log:
            try:
                subprocess.run(command, check=True, timeout=TIME_LIMIT_SECONDS, env=environment, stdout=log, stderr=log)
            except subprocess.CalledProcessError:
                sys.exit((folder / "log.txt").read_text())
        result = json.loads((folder / "result.json").read_text())
    return report(arguments, result)


def run_settings(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Our run as its flags: pretraining on full rows, everything else as by default but the last checkpoint."""
    embedded = folder / "embedded"
    return [
        *("--model_name", str(embedded / "model"), "--dataset", "text", "--train_data", str(embedded / "text.jsonl")),
        *("--context_size", str(CONTEXT), "--packing", "concat", "--precision", "fp32"),
        *("--batch_size_training", str(arguments.rows), "--gradient_accumulation_steps", str(arguments.micro_steps)),
        *("--max_steps", str(arguments.block * (arguments.blocks + 1) + 1), "--num_epochs", "1000"),
        *("--lr", str(LR), "--lr_warmup", "0", "--lr_decay_style", "constant"),
        *("--save_model", "false", "--save_optimizer", "false", "--save_checkpoint_path", str(folder / "run")),
    ]


def measure_on_this_rank(arguments: argparse.Namespace, folder: Path) -> int:
    """Train with our loop; at each border of blocks its stream lets the others train."""
    config = load_config(run_settings(arguments, folder))
    with open_launch(config, resolve(os.environ), time.monotonic()) as launch:
        run = prepare(config, launch)
        assert run is not None
        model, ds_json = folder / "embedded" / "model", effective_ds_config(config, run.plan)
        peers = {name: BareLoop(model, ds_json, config.optimizer, name == "same_loss") for name in PEERS}
        run.stream = stream = Alternating(run, peers, arguments.turn)
        train(run)
        if run.world.rank == 0:
            lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
            losses = {"ours": [json.loads(line)["loss"] for line in lines[:-1]]}
            losses |= {name: peer.losses for name, peer in peers.items()}
            (folder / "result.json").write_text(json.dumps({"wall": stream.wall, "cpu": stream.cpu, "losses": losses}))
        run.world.close()
    return 0


class Alternating(Stream):
    """The run's own stream, which lets each peer train the same rows before every turn of our steps.

    `wall` and `cpu` hold the seconds of each side's turns. One of ours lasts from its first `take` to the first of the
    next turn, so everything that the loop does in a step is inside.
    """

    def __init__(self, run: Run, peers: dict[str, BareLoop], turn: int) -> None:
        rank = run.world.rank
        super().__init__(run.corpus, run.plan, rank, num_workers=run.config.data.num_workers_dataloader)
        self.wall: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        self.cpu: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        self._peers_rows = Stream(run.corpus, run.plan, rank)
        self._peers, self._world, self._turn = peers, run.world, turn
        self._taken = 0

    def take(self) -> list[MicroBatch]:
        """The rows of our next step, after the others' turn if it is theirs."""
        if self._taken % self._turn == 0:
            if self._taken:
                self._end_turn("ours")
            steps = [self._peers_rows.take() for _ in range(self._turn)]
            for name, peer in self._peers.items():
                rows = peer.prepared(steps)
                self._start_turn()
                peer.train(rows)
                self._end_turn(name)
                peer.note_losses()
            self._start_turn()
        self._taken += 1
        return super().take()

    def _start_turn(self) -> None:
        """All ranks together."""
        self._world.barrier("a turn")
        self._started = time.perf_counter(), time.process_time()

    def _end_turn(self, name: str) -> None:
        self.wall[name].append(time.perf_counter() - self._started[0])
        self.cpu[name].append(time.process_time() - self._started[1])


def report(arguments: argparse.Namespace, result: dict[str, Any]) -> int:
    """Print a table and a line of JSON; 1 if a median ratio is above the bound."""
    blocks = {
        clock: {name: in_blocks(arguments, turns) for name, turns in result[clock].items()} for clock in ("wall", "cpu")
    }
    ratios = {
        clock: {
            name: [ours / theirs for ours, theirs in zip(sides["ours"], sides[name], strict=True)] for name in PEERS
        }
        for clock, sides in blocks.items()
    }
    print(
        f"{'':10} {'ms a step':>10} {'first loss':>11} {'last':>7} {'ours/theirs':>12} {'quartiles':>15} {'CPU time':>9}"
    )
    for name, wall in blocks["wall"].items():
        losses: Sequence[float] = result["losses"][name][: arguments.block * (arguments.blocks + 1)]
        line = f"{name:10} {1000 * median(wall) / arguments.block:10.1f} {losses[0]:11.4f} {losses[-1]:7.4f}"
        if name in PEERS:
            low, middle, high = quantiles(ratios["wall"][name], n=4)
            line += f" {middle:12.4f} {low:7.4f} {high:7.4f} {median(ratios['cpu'][name]):9.4f}"
        print(line)
    medians = {name: median(values) for name, values in ratios["wall"].items()}
    within = max(medians.values()) <= ALLOWED
    summary = {"ratio": medians, "allowed": ALLOWED, "within": within, "blocks": blocks}
    print(json.dumps(summary))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(summary, indent=2) + "\n")
    return int(not within)


def in_blocks(arguments: argparse.Namespace, turns: list[float]) -> list[float]:
    """Seconds of each block, from those of its turns; the first block warms up, and what follows the last is not ours."""
    size = arguments.block // arguments.turn
    return [sum(turns[index * size : (index + 1) * size]) for index in range(1, arguments.blocks + 1)]


if __name__ == "__main__":
    sys.exit(main())
