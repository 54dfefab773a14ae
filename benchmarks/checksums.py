"""What `--checksum_interval` costs: the time of a step that is checked, beside one that is not, in runs that take turns.

    python benchmarks/checksums.py [--ranks 2] [--steps 20] [--turns 3]

Trains the embedded default through torchrun, with a check in each step and without any. Prints the median seconds of a step
(the first two of each run left out) and their ratio. A checked step runs one micro-batch twice more, forward and backward, so what
it costs depends on the micro-batches of a step: here there are 6 with two ranks.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    for engine in ("deepspeed", "fsdp"):
        seconds: dict[int, list[float]] = {0: [], 1: []}
        for _ in range(given.turns):
            for interval, found in seconds.items():
                found += steps_of(engine, given.ranks, given.steps, interval)
        without, checked = median(seconds[0]), median(seconds[1])
        print(
            f"{engine:10} not checked {without:.3f} s, checked {checked:.3f} s: {checked / without:.2f} x", flush=True
        )


def steps_of(engine: str, ranks: int, steps: int, interval: int) -> list[float]:
    """Seconds of each step of one run."""
    with tempfile.TemporaryDirectory() as name:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(ROOT / "train.py")]
        words += [
            "--config",
            str(ROOT / "examples/tiny_alpaca.yaml"),
            "--engine",
            engine,
            "--save_checkpoint_path",
            name,
        ]
        words += ["--max_steps", str(steps), "--save_model", "false", "--save_optimizer", "false"]
        words += [
            "--run_validation",
            "false",
            "--log_interval",
            "1",
            "--context_size",
            "160",
            "--bad_records",
            "skip",
            "--checksum_interval",
            str(interval),
        ]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(name) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step_seconds"] for line in lines][WARM_UP:]


if __name__ == "__main__":
    main()
