"""Whether the checkpoints of a run fit on its disk, asked before the model is built."""

from collections.abc import Mapping

from ds_recipes.checkpoint.load import checkpoints
from ds_recipes.checkpoint.manifest import RANGES
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.checkpoint.space import Plan as Saves
from ds_recipes.checkpoint.space import Size, check_space
from ds_recipes.config.schema import Config
from ds_recipes.training.launch import Launch
from ds_recipes.training.saving import PROBE_TOKENS

STATE_BYTES = 20_000  # of state.json without the random generators, on a run of a few data files


def check_room(
    config: Config,
    launch: Launch,
    shapes: Mapping[str, tuple[int, ...]],
    files: Mapping[str, bytes],
    step: int,
    total_steps: int,
) -> None:
    """Say how much the checkpoints from `step` on take and how much is free. Every rank must call it; rank 0 looks.

    Raises:
        CheckpointError: not even one more fits.
    """
    settings = config.checkpoint
    if not settings.save_model:
        return
    vocabulary_size = max((shape[0] for shape in shapes.values() if len(shape) == 2), default=0)
    small = sum(len(content) for content in files.values()) + PROBE_TOKENS * (8 + 4 * vocabulary_size) + STATE_BYTES
    size = Size(shapes, kinds_saved(config), launch.world.size, small)
    keep = Keep(settings.keep_last, settings.keep_every, settings.keep_best)
    saves = Saves(step, total_steps, settings.save_interval_iteration)

    def look() -> list[str]:
        if launch.world.rank > 0:
            return []
        existing = [int(path.name.removeprefix("iter_")) for path in checkpoints(launch.folder)]
        return check_space(launch.folder, size, keep, saves, existing)

    for line in launch.world.check("room for checkpoints", look):
        launch.say(line)


def kinds_saved(config: Config) -> int:
    """Float32 values that a checkpoint keeps of each parameter: the weight, and the moments of its optimizer.

    Another program's layout has the weights a second time, as the model computes with them.
    """
    weights = 1 if config.checkpoint.checkpoint_format == RANGES else 2
    if not config.checkpoint.save_optimizer:
        return weights
    optimizer = config.optimizer
    if optimizer.optimizer_type == "sgd":
        return weights + bool(optimizer.sgd_momentum)
    return weights + 2
