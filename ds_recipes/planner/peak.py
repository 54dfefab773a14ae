"""The worst moment of a step."""

from ds_recipes.planner.architecture import Architecture
from ds_recipes.planner.engines import fsdp2, low_stages, zero3
from ds_recipes.planner.memory import Activations, Moment
from ds_recipes.planner.situation import Situation


def moments(model: Architecture, situation: Situation) -> list[Moment]:
    """The moments of a step at which a rank's memory may be largest."""
    engine = fsdp2 if situation.engine == "fsdp" else zero3 if situation.stage == 3 else low_stages
    return list(engine.moments(model, situation, Activations(model, situation)))


def worst(found: list[Moment]) -> Moment:
    """The one with the most bytes."""
    return max(found, key=lambda moment: moment.parts.total)
