"""Where a run begins: its own newest valid checkpoint, another run's, the one that `--resume` names, or the first weights."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_recipes.checkpoint.load import (
    Found,
    checkpoints,
    find_newest,
    open_reader,
    remove_partials,
    set_aside,
)
from ds_recipes.checkpoint.rng import derive_rng, restore_rng
from ds_recipes.config.checkpoint_settings import RESUME_WORDS
from ds_recipes.config.data_rules import parse_positions
from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config
from ds_recipes.data.skips import Skips
from ds_recipes.engine.base import Engine
from ds_recipes.errors import CheckpointError
from ds_recipes.models.load import ModelSource
from ds_recipes.ranges import RangeReader
from ds_recipes.training.changes import Files, environment_line, not_recorded, refuse_changes
from ds_recipes.training.identity import Identity
from ds_recipes.training.state import TrainingState
from ds_recipes.world.group import World

NO_DECAY = "no_weight_decay"
"""Entry of state.json: names of the trained parameters that weight decay leaves alone."""

SHOWN_NAMES = 4


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    `found` is None for the initial weights. `origin` says what another folder's or an older checkpoint the run was begun
    from; every checkpoint keeps it, so that the same command, queued again, goes on instead of beginning again. `goes_back`: newer
    checkpoints of the run folder are not this run's any more. `line` is what the user should know.
    """

    found: Found | None
    origin: Mapping[str, Any] | None = None
    goes_back: bool = False
    line: str | None = None


@dataclass(frozen=True)
class Now:
    """What a run is now, to be compared with the checkpoint that it continues."""

    trained: Collection[str]  # names of parameters
    spared: Collection[str]  # those of them that do not decay
    identity: Identity
    environment: Mapping[str, str]
    files: Files
    plan: Plan


def find_start(config: Config, folder: Path, world: World) -> Start:
    """The checkpoint to continue from, verified. Every rank must call it, and rank 0 must hold the run lock.

    Raises:
        CheckpointError: checkpoints are there and none is valid, or `resume` asks for something else.
    """
    remove_partials(folder, world)
    resume, verify = config.checkpoint.resume, config.checkpoint.verify
    if resume not in RESUME_WORDS and Path(resume).resolve() != folder.resolve():
        return _from_path(Path(resume), folder, verify, world)
    found = find_newest(folder, world, verify)
    if found is not None and resume == "none":
        raise CheckpointError(
            f"{folder}: holds checkpoints (the newest is {found.path.name}), and --resume none refuses to continue them. "
            "Choose a new --save_checkpoint_path, or leave --resume out."
        )
    if found is not None:
        _refuse_older(resume, found)
        return Start(found, found.state.get("origin"))
    other = config.checkpoint.load_checkpoint_path
    if other is not None and Path(other).resolve() != folder.resolve():
        found = find_newest(Path(other).resolve(), world, verify)
        if found is None:
            raise CheckpointError(
                f"--load_checkpoint_path {other}: holds no checkpoint (no iter_* folder). Name a run folder that has one."
            )
        _refuse_older(resume, found)
        return Start(found, _origin(str(Path(other).resolve()), found))
    if resume == "require":
        raise CheckpointError(
            f"{folder}: holds no checkpoint, and --resume require refuses to start from nothing. "
            "Check --save_checkpoint_path, or leave --resume out."
        )
    return Start(None)


def _refuse_older(resume: str, found: Found) -> None:
    """With `require`, only the newest checkpoint will do.

    Raises:
        CheckpointError: newer ones than `found` are damaged.
    """
    if resume == "require" and found.skipped:
        raise CheckpointError(
            "\n".join(found.skipped)
            + f"\n--resume require refuses to continue an older one. Bring it back from a copy, or leave --resume out to go on "
            f"from {found.path.name} (step {found.manifest.step}) and keep the damaged one under another name."
        )


def _from_path(path: Path, folder: Path, verify: str, world: World) -> Start:
    """Begin from the checkpoint or run folder that `--resume` names, or go on where that was done before.

    Raises:
        CheckpointError: it cannot be used, or the run folder holds checkpoints of something else.
    """
    asked, own_folder = path.resolve(), folder.resolve()
    inside = asked.parent == own_folder
    name = asked.name if inside else str(asked)  # a run folder may be moved
    has_own = world.broadcast(bool(checkpoints(folder)))
    own = find_newest(folder, world, "sizes") if has_own else None
    origin = own.state.get("origin") if own is not None else None
    if own is not None and origin is not None and origin.get("path") == name:
        found = find_newest(folder, world, verify)
        assert found is not None
        again = f" To go back there once more, move {own.path.name} away." if inside else ""
        line = f"--resume {path}: this run began there already; it goes on from its own newest checkpoint.{again}"
        return Start(found, origin, line=line)
    if own is not None and not inside:
        raise CheckpointError(
            f"{folder}: holds checkpoints that were not begun from --resume {path} (the newest is {own.path.name}). Choose a new "
            "--save_checkpoint_path to begin from there, or leave --resume out to continue these."
        )
    found = find_newest(asked, world, verify)
    if found is None:
        raise CheckpointError(
            f"--resume {path}: holds no checkpoint (no iter_* folder). Name a checkpoint, or a run folder that has one."
        )
    return Start(found, _origin(name, found), goes_back=inside)


def _origin(path: str, found: Found) -> dict[str, Any]:
    """What a checkpoint's state.json remembers of where its run was begun."""
    return {"path": path, "checkpoint": found.path.name, "step": found.manifest.step}


def announce_start(config: Config, start: Start, now: Now, world: World, say: Callable[[str], None]) -> None:
    """Refuse a start from another model or with other settings; say what differs and is allowed, or was damaged.

    Raises:
        CheckpointError: on all ranks.
    """
    found = start.found
    if found is None:
        return
    for line in found.skipped:
        say(f"warning: {line}")
    if start.line is not None:
        say(f"note: {start.line}")
    for line in world.check("resume", lambda: check_continues(config, found, now)):
        say(f"allowed: {line}")
    missing = not_recorded(found.state["identity"], now.identity)
    if missing:
        say(
            f"note: {found.path.name} does not record {', '.join(missing)}; whether that is the same as now is not known"
        )
    changed = environment_line(found.state.get("environment", {}), now.environment)
    if changed is not None:
        say(f"changed since {found.path.name}: {changed}")
    thawed = [name for name in found.manifest.frozen if name in now.trained]
    if thawed:
        say(
            f"note: {len(thawed)} parameters were frozen in {found.path.name} and train now; their moments start at zero"
        )
    if config.optimizer.weight_decay:
        for line in decay_changes(found, now):
            say(f"note: {line}")


def decay_changes(found: Found, now: Now) -> Iterator[str]:
    """Which parameters decayed in a checkpoint's run and do not now, or the other way round.

    Checkpoints that do not say are of versions that spared what has fewer than two dimensions.
    """
    before = found.state.get(NO_DECAY)
    if before is None:
        before = [name for name, shape in found.manifest.shapes().items() if len(shape) < 2]
    trained = set(now.trained) - set(found.manifest.frozen)
    for names, then, today in (
        (set(now.spared) - set(before), "decayed", "do not decay now"),
        (set(before) - set(now.spared), "did not decay", "decay now"),
    ):
        changed = sorted(names & trained)
        if changed:
            more = len(changed) - SHOWN_NAMES
            shown = ", ".join(changed[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
            yield f"{len(changed)} parameters that {then} in {found.path.name} {today}: {shown}"


def check_continues(config: Config, found: Found, now: Now) -> list[str]:
    """Refuse a checkpoint of other settings; return what differs and was allowed, line by line.

    Raises:
        CheckpointError: with every difference that `allow_change` does not name.
    """
    allowed, state = config.checkpoint.allow_change, found.state
    lines = refuse_changes(
        state["identity"], now.identity, allowed, str(found.path), state.get("data_files", ()), now.files, now.plan
    )
    has_moments = config.optimizer.optimizer_type == "adamw" or config.optimizer.sgd_momentum > 0
    if "exp_avg" not in found.manifest.kinds and has_moments:
        if "optimizer" not in allowed:
            raise CheckpointError(
                f"{found.path}: was saved without the optimizer's state, so training would not continue but start with "
                "empty moments. Allow that with --allow_change optimizer."
            )
        lines.append("the optimizer starts with empty moments")
    return lines


def leave_behind(start: Start, folder: Path, attempt: str, world: World, say: Callable[[str], None]) -> None:
    """Rename the run folder's checkpoints that a start does not go on from: damaged ones, and those that it goes back behind.

    Their names are free then: a checkpoint is never published over another. Every rank must call it, after all that can refuse.
    """
    found = start.found
    if found is None or found.path.parent.resolve() != folder.resolve():
        return
    if start.goes_back or found.skipped:
        aside = set_aside(folder, found.manifest.step, attempt, world)
        if aside:
            why = f"going back to {found.path.name}; newer" if start.goes_back else "damaged"
            say(f"note: {why} checkpoints are kept under other names: {', '.join(path.name for path in aside)}")


def skips_of(config: Config, found: Found | None) -> tuple[Skips, list[str]]:
    """The positions to leave out: those that the checkpoint remembers, and those of the settings that still lie ahead.

    Second: a line for each range of the settings that comes too late.
    """
    saved = [(start, stop) for start, stop in found.state.get("skip_samples", ())] if found is not None else []
    position = int(found.state["position"]) if found is not None else 0
    ahead, late = [], []
    for text in config.data.skip_samples:
        start, stop = parse_positions(text)
        known = any(first <= start and stop <= end for first, end in saved)
        if start < position and not known:
            late.append(f"--skip_samples {text}: positions below {position:,} have been trained on already")
        if stop > position:
            ahead.append((max(start, position), stop))
    return Skips([*saved, *ahead]), late


def read_start(source: ModelSource, found: Found | None, world: World) -> RangeReader:
    """Open what the engine is to be filled from: the checkpoint, or the initial weights. Every rank must call it.

    Raises:
        InputError: the model's folder does not hold its weights.
    """
    if found is not None:
        return open_reader(found.path, found.manifest)
    return world.check("initial weights", lambda: source.initial_weights(world.device))


def load_start(config: Config, engine: Engine, start: RangeReader, found: Found | None, world: World) -> TrainingState:
    """Fill the engine and the random generators. No communication.

    On as many ranks as before each generator goes on where it was; else, and where a checkpoint keeps none, they are
    seeded from (seed, step, rank), so that the same start gives the same numbers.
    """
    engine.load_shards(start)
    if found is None:
        derive_rng(config.run.seed, 0, world.rank)
        return TrainingState()
    engine.load_scaler_state(found.state.get("scaler", {}))
    state = TrainingState.from_json(found.state)
    saved = found.state["rng"]
    if len(saved) == world.size:
        restore_rng(saved[world.rank])
    else:
        derive_rng(config.run.seed, state.step, world.rank)
    return state
