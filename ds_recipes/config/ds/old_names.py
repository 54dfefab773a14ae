"""Put the old names of a DeepSpeed JSON into today's, as DeepSpeed does it."""

import json
from collections.abc import Mapping
from typing import Any

from ds_recipes.config.ds.findings import Findings
from ds_recipes.config.ds.keys_zero import OLD_OFFLOAD, SHORT_NAMES
from ds_recipes.config.ds.values import read_value

ZERO = "zero_optimization"


def with_todays_names(tree: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """A copy of the JSON in today's names; each translation is noted, and a key under two names is a problem."""
    today = dict(tree)
    if "bfloat16" in today:
        old = today.pop("bfloat16")
        if today.get("bf16") is None:
            today["bf16"] = old
            found.notes.append("bfloat16 is the old name of bf16")
        else:
            found.problems.append(
                "bfloat16 is the old name of bf16, which is there too: DeepSpeed ignores it, leave it out"
            )
    zero = today.get(ZERO)
    if isinstance(zero, bool):
        bucket = {"allgather_bucket_size": today.pop("allgather_size")} if "allgather_size" in today else {}
        today[ZERO] = {"stage": 1, **bucket} if zero else {"stage": 0}
        found.notes.append(f'{ZERO} is {json.dumps(zero)}, which is "stage": {int(zero)}')
    elif isinstance(zero, Mapping):
        today[ZERO] = _zero(dict(zero), found)
    return today


def _zero(zero: dict[str, Any], found: Findings) -> dict[str, Any]:
    for old, name in (SHORT_NAMES | OLD_OFFLOAD).items():
        if old not in zero:
            continue
        value = zero.pop(old)
        key = f"{ZERO}.{old}"
        if name in zero:
            found.problems.append(
                f"{key} is the old name of {name}, which is there too: DeepSpeed refuses both, leave it out"
            )
        elif old in SHORT_NAMES:
            zero[name] = value
            found.notes.append(f"{key} is another name of {name}")
        elif value not in (None, "auto"):
            _offload(zero, key, name, value, found)
    return zero


def _offload(zero: dict[str, Any], key: str, name: str, value: Any, found: Findings) -> None:
    try:
        is_on = read_value(value, "bool", is_lax=True)
    except ValueError as wanted:
        found.problems.append(f"{key} must be {wanted}, not {json.dumps(value)}: it is the old name of {name}")
        return
    if is_on:
        zero[name] = {"device": "cpu"}
        found.notes.append(f'{key} is the old name: it is read as "{name}": {{"device": "cpu"}}')
