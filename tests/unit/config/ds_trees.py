"""What the tests of a DeepSpeed JSON's check share: short ways to write one, and what the check says."""

from typing import Any

from ds_recipes.config.ds.check import check_tree

ZERO = "zero_optimization"
NOTHING: dict[str, list[str]] = {"problems": [], "unsupported": [], "notes": [], "lacking": []}


def zero(stage: Any = 3, **keys: Any) -> dict[str, Any]:
    return {ZERO: {"stage": stage, **keys}}


def offload(name: str = "offload_optimizer", stage: int = 3, **keys: Any) -> dict[str, Any]:
    return zero(stage, **{name: keys})


def said(tree: dict[str, Any], engine: str = "deepspeed") -> dict[str, list[str]]:
    found = check_tree(tree, engine)
    return {name: getattr(found, name) for name in NOTHING}
