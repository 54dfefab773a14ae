"""What a run says before its first step: what was read, how it is laid out, in which precision, one decoded row."""

from ds_recipes.checkpoint.load import Found
from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config
from ds_recipes.engine.base import Engine
from ds_recipes.training.inputs import Inputs
from ds_recipes.training.launch import Launch
from ds_recipes.training.state import TrainingState


def announce_inputs(config: Config, launch: Launch, plan: Plan, inputs: Inputs) -> None:
    """The data, the layout of a step, and one row as the model will see it."""
    for note in config.ds.notes if config.ds else ():
        launch.say(f"note: {note}")
    for line in inputs.data.corpus.describe():
        launch.say(f"training data: {line}")
    for line in inputs.data.validation.describe() if inputs.data.validation else ():
        launch.say(f"validation data: {line}")
    for note in inputs.notes:
        launch.say(f"note: {note}")
    launch.say(
        f"a step: {plan.global_rows} rows of {plan.context_size} tokens = {plan.world_size} ranks x {plan.micro_steps} "
        f"micro-steps x {plan.rows_per_rank} rows; {plan.total_steps} steps"
    )
    launch.say(f"one row, targets marked:\n{inputs.data.corpus.show(0, inputs.tokenizer)}")


def announce_engine(launch: Launch, engine: Engine, plan: Plan, state: TrainingState, found: Found | None) -> None:
    """How the model is sharded and in which precision, and where the run begins."""
    for key, value in engine.describe().items():
        launch.say(f"  {key.replace('_', ' ')}: {value}")
    if found is not None:
        launch.say(f"continuing from {found.path} (step {state.step} of {plan.total_steps})")
