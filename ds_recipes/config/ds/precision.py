"""Read bf16, fp16 and torch_autocast together: the run has one precision."""

import json
from collections.abc import Mapping
from typing import Any

from ds_recipes.config.ds.findings import Findings
from ds_recipes.config.ds.keys_precision import DTYPE_OF, PRECISION
from ds_recipes.config.ds.values import read_value

HALVES = ("bf16", "fp16")


def bind_precision(tree: Mapping[str, Any], found: Findings) -> None:
    """Bind the run's precision where the JSON says it; "auto" and a section that is not there leave it to the run."""
    switches = {name: _switch(tree[name]) for name in HALVES if isinstance(tree.get(name), Mapping)}
    on = [name for name, switch in switches.items() if switch is True]
    if len(on) == 2:
        found.problems.append("bf16.enabled is true, and fp16.enabled too: DeepSpeed refuses both, set one to false")
    elif on:
        found.bind("precision", f"{on[0]}.enabled", on[0], True)
    elif switches.get("bf16") is False:
        also = ("fp16",) if switches.get("fp16") == "auto" else ()
        found.bind("precision", "bf16.enabled", "fp32", False, also=also)
    elif switches.get("fp16") is False:
        found.bind("precision", "fp16.enabled", "bf16", False, also=("fp32",))
    _bind_autocast(found.tree, on, found)
    param_dtype = found.tree.get("data_types", {}).pop("param_dtype", None)
    if param_dtype is not None and not on:
        found.bind("precision", "data_types.param_dtype", PRECISION[DTYPE_OF[param_dtype]], param_dtype)


def _switch(section: Mapping[str, Any]) -> Any:
    value = section.get("enabled", False)
    try:
        return value if value == "auto" else read_value(value, "bool", is_lax=True)
    except ValueError:
        return "auto"  # the wrong type is found where the key is checked


def _bind_autocast(tree: Mapping[str, Any], on: list[str], found: Findings) -> None:
    autocast = tree.get("torch_autocast") or {}
    if autocast.get("enabled") and not on:
        found.bind("precision", "torch_autocast.enabled", "fp32", True)
        if autocast.get("dtype") is None:
            found.notes.append("torch_autocast.dtype is missing: it is read as " + json.dumps("bfloat16"))
