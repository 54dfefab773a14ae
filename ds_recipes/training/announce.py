"""What a run says before its first step: what was read, how it is laid out, in which precision, one decoded row."""

import sys
from collections.abc import Mapping
from itertools import groupby
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_recipes.checkpoint.load import Found
from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config
from ds_recipes.engine.base import Engine
from ds_recipes.models.attention import rope_note
from ds_recipes.models.weight_decay import Decay, weight_decay_of
from ds_recipes.training.inputs import Inputs
from ds_recipes.training.launch import Launch
from ds_recipes.training.run_record import is_pure_low_precision
from ds_recipes.training.state import TrainingState
from ds_recipes.training.trackers.console import is_terminal


def announce_inputs(config: Config, launch: Launch, plan: Plan, inputs: Inputs) -> None:
    """The data, the layout of a step, and one row as the model will see it."""
    for note in config.ds.notes if config.ds else ():
        launch.say(f"note: {note}")
    for warning in config.ds.warnings if config.ds else ():
        launch.say(f"warning: {warning}")
    for line in inputs.data.corpus.describe():
        launch.say(f"training data: {line}")
    for line in inputs.data.validation.describe() if inputs.data.validation else ():
        launch.say(f"validation data: {line}")
    for note in inputs.notes:
        launch.say(f"note: {note}")
    rope = rope_note(inputs.source.hf_config, plan.context_size)
    if rope is not None:
        launch.say(f"warning: {rope}")
    launch.say(
        f"a step: {plan.global_rows} rows of {plan.context_size} tokens = {plan.world_size} ranks x {plan.micro_steps} "
        f"micro-steps x {plan.rows_per_rank} rows; {plan.total_steps} steps"
    )
    launch.say("\n".join(decay_lines(weight_decay_of(inputs.skeleton), config.optimizer.weight_decay)))
    launch.say(f"one row, targets marked:\n{inputs.data.corpus.show(0, inputs.tokenizer)}")


def decay_lines(decays: Mapping[str, Decay], weight_decay: float) -> list[str]:
    """What decays and what does not, one line a kind of parameter; one line alone where nothing does."""
    if not weight_decay:
        return ["weight decay: 0, nothing decays"]
    verdicts = sorted(decays.values(), key=_verdict)
    rows = []
    for (spared, kind), alike in groupby(verdicts, key=_verdict):
        numels = [decay.numel for decay in alike]
        rows.append((f"no ({spared})" if spared else "yes", f"{len(numels):,} x {kind}", f"{sum(numels):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"weight decay {weight_decay:g}, by kind of parameter, with the number of values:",
        *(f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows),
    ]


def _verdict(decay: Decay) -> tuple[str, str]:
    return decay.spared or "", decay.kind


def announce_engine(
    config: Config, launch: Launch, engine: Engine, plan: Plan, state: TrainingState, found: Found | None
) -> None:
    """How the model is sharded and in which precision, and where the run begins."""
    if engine.attention == "eager" and config.model.attn_implementation == "sdpa":
        launch.say(
            f"note: {type(engine.model).__name__} has no sdpa attention in transformers; eager attention computes the same, with "
            "more memory"
        )
    if launch.world.rank == 0:
        description = engine.describe()
        show_table(description, sys.stdout)
        if launch.record is not None:
            launch.record.write_precision(description)
    if found is not None:
        launch.say(f"continuing from {found.path} (step {state.step} of {plan.total_steps})")


NO_MASTERS = "no float32 master weights: updates below a weight's rounding are lost"


def show_table(description: Mapping[str, Any], stream: TextIO) -> None:
    """Print what an engine says of its precision and sharding: a table on a terminal, else one plain line an entry.

    Master weights below float32 are shown in red, in plain lines as a warning.
    """
    warned = {"master"} if is_pure_low_precision(description) else set()
    rows = [
        (key.replace("_", " "), f"{value} ({NO_MASTERS})" if key in warned else str(value), key in warned)
        for key, value in description.items()
        if value is not None
    ]
    if is_terminal(stream):
        table = Table(title="Precision and sharding", show_header=False)
        for name, value, is_warning in rows:
            style = "bold red" if is_warning else ""
            table.add_row(Text(name, style), Text(value, style))
        Console(file=stream).print(table, markup=False)
        return
    width = max(len(name) for name, *_ in rows)
    lines = [f"  {name:<{width}}  {'warning: ' if is_warning else ''}{value}" for name, value, is_warning in rows]
    print("\n".join(["precision and sharding:", *lines]), file=stream)
    stream.flush()
