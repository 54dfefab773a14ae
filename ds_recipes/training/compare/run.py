"""Both engines, one after the other, on the first steps of a run. Nothing is written into the run folder."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import Config
from ds_recipes.engine.create import check_device
from ds_recipes.errors import InputError
from ds_recipes.training.compare.measure import measure, moved
from ds_recipes.training.compare.show import lines, write_json
from ds_recipes.training.compare.verdict import compare, needs_own_distance
from ds_recipes.training.inputs import read_inputs, read_model
from ds_recipes.world.group import World


def compare_on(world: World, configs: Sequence[Config], steps: int, output: Path | None) -> int:
    """Measure each of two configs, which differ in their engine; returns 0 if they agree, 1 if not.

    Every rank must call it.

    Raises:
        ConfigError, InputError: what train.py would refuse.
    """

    def say(line: str) -> None:
        if world.rank == 0:
            print(line, flush=True)

    for config in configs:
        world.check("device", partial(check_device, config, world.device))
    world.check("output", lambda: _check_output(output) if world.rank == 0 else None)
    inputs = read_inputs(configs[0], world, read_model(configs[0], world, None), say)
    plan = make_plan(configs[0], world.size, inputs.data.corpus.num_rows)
    assert plan.total_steps is not None
    steps = min(steps, plan.total_steps)
    measured = []
    for config in configs:
        say(f"{config.run.engine}: {steps} steps of {plan.global_rows} rows, ranks: {world.size}")
        measured.append(measure(config, plan, inputs, world, steps))
    one, other = measured
    weights, again, own_weights = moved(one, other, world), None, None
    if needs_own_distance(plan.lr):
        say(f"{one.engine} once more, begun with a rounding error, to see how far that alone leads")
        again = measure(configs[0], plan, inputs, world, steps, perturbed=True)
        own_weights = moved(one, again, world)
    verdict = compare(one, other, configs[0].run.precision, plan.lr, weights, again, own_weights)
    for line in lines(one, other, verdict, on_gpu=world.device.type == "cuda"):
        say(line)
    if output is not None and world.rank == 0:
        write_json(output, one, other, verdict, world.size)
    return 0 if verdict.agree else 1


def _check_output(output: Path | None) -> None:
    """Find out before the training that the file cannot be written.

    Raises:
        InputError: its folder cannot be made, or it is a folder itself.
    """
    if output is None:
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror} ({error.filename}). Name another file.") from error
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder; name the JSON file to write")
