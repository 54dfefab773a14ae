"""Where a run begins: its own newest valid checkpoint, another run's, or the initial weights."""

from collections.abc import Mapping
from pathlib import Path

from ds_recipes.checkpoint.load import CheckpointReader, Found, check_same_model, find_newest, remove_partials
from ds_recipes.checkpoint.rng import derive_rng, restore_rng
from ds_recipes.config.data_rules import parse_positions
from ds_recipes.config.schema import Config
from ds_recipes.data.skips import Skips
from ds_recipes.engine.base import Engine
from ds_recipes.errors import CheckpointError
from ds_recipes.models.load import ModelSource
from ds_recipes.ranges import RangeReader
from ds_recipes.training.identity import Files, refuse_changes
from ds_recipes.training.state import TrainingState
from ds_recipes.world.group import World


def find_start(config: Config, folder: Path, world: World) -> Found | None:
    """The checkpoint to continue from, verified; None for a run that begins anew. Every rank must call it.

    Raises:
        CheckpointError: checkpoints are there and none is valid, or `resume` asks for something else.
    """
    remove_partials(folder, world)
    found = find_newest(folder, world)
    if found is not None and config.checkpoint.resume == "none":
        raise CheckpointError(
            f"{folder}: holds checkpoints (the newest is {found.path.name}), and --resume none refuses to continue them. "
            "Choose a new --save_checkpoint_path, or leave --resume out."
        )
    other = config.checkpoint.load_checkpoint_path
    if found is None and other is not None and Path(other).resolve() != folder.resolve():
        found = find_newest(Path(other), world)
        if found is None:
            raise CheckpointError(
                f"--load_checkpoint_path {other}: holds no checkpoint (no iter_* folder). Name a run folder that has one."
            )
    if found is None and config.checkpoint.resume == "require":
        raise CheckpointError(
            f"{folder}: holds no checkpoint, and --resume require refuses to start from nothing. "
            "Check --save_checkpoint_path, or leave --resume out."
        )
    return found


def check_continues(
    config: Config,
    found: Found,
    shapes: Mapping[str, tuple[int, ...]],
    identity: Mapping[str, str],
    files: Files,
) -> list[str]:
    """Refuse a checkpoint of another model or of other settings; return what differs and was allowed, line by line.

    Raises:
        CheckpointError: with every difference that `allow_change` does not name.
    """
    check_same_model(found.manifest, shapes, str(found.path))
    allowed = config.checkpoint.allow_change
    lines = refuse_changes(
        found.state["identity"], identity, allowed, str(found.path), found.state.get("data_files", ()), files
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
        return CheckpointReader(found.path, found.manifest)
    return world.check("initial weights", lambda: source.initial_weights(world.device))


def load_start(config: Config, engine: Engine, start: RangeReader, found: Found | None, world: World) -> TrainingState:
    """Fill the engine and the random generators. No communication."""
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
