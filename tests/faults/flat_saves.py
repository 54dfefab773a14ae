"""Saves of a few small tensors by real processes with a fault armed, and what must hold afterwards."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ds_recipes.checkpoint.load import CheckpointReader, find_newest, remove_partials
from ds_recipes.fsops import faults
from ds_recipes.world.group import World, solo
from tests.ranks.launch import RanksFailed, fork_rank, run_ranks, wait_for
from tests.unit.checkpoint.flat_engine import FlatEngine, save, some_tensors

KEEP_LAST = 2


def armed(text: str) -> dict[str, str]:
    """The environment that arms faults."""
    return {faults.PERMISSION: "1", faults.VARIABLE: text}


def save_and_say(world: World, folder: str, step: int) -> str:
    """Save with the faults of the environment; rank 0 notes outside of the run folder that it was told of success."""
    os.environ["RANK"] = str(world.rank)
    faults.arm_from_environment()
    saved = save(Path(folder), step, ShareEngine(step, world), world, keep_last=KEEP_LAST)
    if world.rank == 0:
        Path(f"{folder}.said").write_text(str(step))
    return saved.name


class ShareEngine(FlatEngine):
    """This rank's part of each tensor: all elements from one number on, up to another."""

    def __init__(self, step: int, world: World) -> None:
        super().__init__(some_tensors(step))
        self.world = world

    def shards(self):  # type: ignore[no-untyped-def]
        for shard in super().shards():
            start, stop = (shard.length * rank // self.world.size for rank in (self.world.rank, self.world.rank + 1))
            parts = [part[start:stop] for part in (shard.fp32, shard.exp_avg, shard.exp_avg_sq)]
            yield type(shard)(shard.name, shard.shape, start, stop - start, *parts)


def save_with(text: str, folder: Path, step: int, ranks: int = 1) -> str | None:
    """Save `step` on so many ranks with faults armed. None if all ranks were told that it is saved, else what they said."""
    if ranks == 1:
        output = folder.with_name(f"{folder.name}.txt")
        process = fork_rank(_alone, (str(folder), step), output, armed(text))
        assert wait_for([process], 60), "one rank alone hangs"
        said = output.read_text()
        output.unlink()
        return None if process.exitcode == 0 else f"status {process.exitcode}\n{said}"
    try:
        names = run_ranks(save_and_say, ranks, str(folder), step, env=armed(text), with_deepspeed=False, timeout=60)
    except RanksFailed as failed:
        return str(failed)
    assert len(set(names)) == 1
    return None


def count_calls(folder: Path, step: int, ranks: int = 1, conditions: str = "within=saving") -> list[int]:
    """How many calls each rank makes for one save without a fault."""
    logs = [folder.with_name(f"log{rank}") for rank in range(ranks)]
    text = "; ".join(f"log:{log}@1 rank={rank} {conditions}" for rank, log in enumerate(logs))
    assert save_with(text, folder, step, ranks) is None
    return [len(log.read_text().splitlines()) for log in logs]


def newest_after(folder: Path, contents: Mapping[int, Mapping[str, torch.Tensor]], damaged: int = 0) -> int:
    """The step of the newest checkpoint, which must be one of `contents`, bit for bit; nothing newer may be damaged."""
    found = find_newest(folder, solo())
    assert found is not None, "nothing is left"
    assert not found.skipped, found.skipped
    reader = CheckpointReader(found.path, found.manifest)
    for name, tensor in contents[found.manifest.step].items():
        out = torch.empty(tensor.numel())
        reader.read_into("fp32", name, 0, out)
        assert torch.equal(out, tensor.reshape(-1)), f"{name} of {found.path} is not what was saved"
    return found.manifest.step


def check_after(text: str, folder: Path, old: int, new: int, later: int) -> int:
    """Assert the invariant after a save of `new` over `old`, in sight of a next save; returns the step that was found."""
    contents = {step: some_tensors(step) for step in (old, new, later)}
    step = newest_after(folder, contents)
    said = Path(f"{folder}.said")
    assert step >= (int(said.read_text()) if said.exists() else old), f"{text}: a checkpoint that was reported is lost"
    said.unlink(missing_ok=True)
    remove_partials(folder, solo())
    save(folder, later, keep_last=KEEP_LAST)
    assert newest_after(folder, contents) == later
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    assert not left, f"{text}: {left} is left over"
    return step


def _alone(folder: str, step: int) -> int:
    save_and_say(solo(), folder, step)
    return 0
