"""Whether DeepSpeed takes a value for a key: its pydantic models' lax reading, and what it does with the others."""

import json
import math
import re
from typing import Any

from ds_recipes.config.ds.table import Entry

WORDS = {"true", "t", "yes", "y", "on", "1", "false", "f", "no", "n", "off", "0"}
ANY_CASE = {"communication_data_type", "seq_parallel_communication_data_type", "gradient_allreduce_op"}
"""Keys whose choices DeepSpeed takes in any case; all of the section "checkpoint" too."""

STOPS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "sequence_parallel_size",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "gradient_allreduce_op",
    "wall_clock_breakdown",
    "flops_profiler.enabled",
    "data_types.grad_accum_dtype",
    "data_types.param_dtype",
    "data_types.buffer_dtype",
    "data_types.keep_in_fp32_modules",
    "torch_autocast.dtype",
    "torch_autocast.lower_precision_safe_modules",
    "optimizer.type",
    "scheduler.type",
    "checkpoint.tag_validation",
    "checkpoint.parallel_write.pipeline_stage",
    "checkpoint.writer.type",
    "checkpoint.writer.data_parallel",
}
"""Keys without a model at whose wrong values DeepSpeed stops, when it reads them or when it starts."""

NO_BOOL = {"fp16.loss_scale", "fp16.loss_scale_window", "fp16.min_loss_scale"}
"""Numbers of models for which DeepSpeed refuses true and false, and texts such as "5.0"."""

NO_TEXT = {"zero_optimization.zenflow.select_interval", "zero_optimization.zenflow.update_interval"}
"""Numbers of models for which DeepSpeed refuses any text."""


def is_refused(entry: Entry) -> bool:
    """True if DeepSpeed stops at a wrong value of this key; else it takes the value and does something with it."""
    return entry.checked or entry.path in STOPS


def wrong_value(value: Any, entry: Entry) -> str:
    """What the value must be, where it is not that; empty where it is, or where DeepSpeed reads it as that."""
    if entry.kind in ("any", "removed") or value == "auto":
        return ""
    if value is None:
        return "" if entry.null or not is_refused(entry) else _wanted(entry)
    read = _lax(value, entry) if entry.checked else _as_it_stands(value, entry)
    return "" if read is not None and _within(read, entry) else _wanted(entry)


def is_text_for_bool(value: Any, entry: Entry) -> bool:
    """True where DeepSpeed takes any text for true, "false" as well."""
    return entry.kind == "bool" and not entry.checked and isinstance(value, str) and value != "auto"


def _lax(value: Any, entry: Entry) -> Any:
    """The value as pydantic reads it, or None."""
    match entry.kind:
        case "bool":
            is_word = isinstance(value, str) and value.lower() in WORDS
            return True if isinstance(value, bool) or is_word or (value in (0, 1) and _is_number(value)) else None
        case "int" | "float":
            if isinstance(value, bool):
                return None if entry.path in NO_BOOL else int(value)
            if isinstance(value, str) and (
                entry.path in NO_TEXT or (entry.path in NO_BOOL and entry.kind == "int" and "." in value)
            ):
                return None
            number: Any = _number_in(value, entry.kind) if isinstance(value, str) else value
            is_whole = _is_number(number) and (entry.kind == "float" or number == int(number))
            return number if is_whole else None
        case "text":
            return value if isinstance(value, str) else None
        case "list":
            is_one = isinstance(value, str) and entry.parent.endswith("leaf_module")
            return value if is_one or (isinstance(value, list) and _are_items(value, entry)) else None
        case "object" | "section":
            return value if isinstance(value, dict) else None
    return _choice(value, entry)


def _as_it_stands(value: Any, entry: Entry) -> Any:
    """The value if the code that reads it can use it, or None."""
    match entry.kind:
        case "bool":
            return True if entry.path not in STOPS or isinstance(value, int) else None  # anything has a truth value
        case "int" | "float":
            is_fit = isinstance(value, bool) or (_is_number(value) and (entry.kind == "float" or value == int(value)))
            return value if is_fit else None
        case "text":
            return value if isinstance(value, str) else None
        case "list":
            return value if isinstance(value, list) and _are_items(value, entry) else None
        case "object" | "section":
            return value if isinstance(value, dict) else None
    return _choice(value, entry)


def _are_items(values: list[Any], entry: Entry) -> bool:
    if entry.choices:
        return all(value in entry.choices for value in values)
    return entry.items != "text" or all(isinstance(value, str) for value in values)


def _choice(value: Any, entry: Entry) -> Any:
    if isinstance(value, str) and (entry.path in ANY_CASE or entry.path.startswith("checkpoint.")):
        return (
            True if value.lower() in {choice.lower() for choice in entry.choices if isinstance(choice, str)} else None
        )
    if entry.checked and isinstance(value, str) and value.strip() in {str(each) for each in entry.choices}:
        return True  # "3" for 3
    if isinstance(value, bool | int | float) and all(isinstance(choice, int) for choice in entry.choices):
        return True if value in entry.choices else None
    return True if isinstance(value, str) and value in entry.choices else None


def _within(read: Any, entry: Entry) -> bool:
    if entry.kind not in ("int", "float"):
        return True
    return (
        (entry.least is None or read >= entry.least)
        and (entry.above is None or read > entry.above)
        and (entry.most is None or read <= entry.most)
        and (entry.below is None or read < entry.below)
    )


def _number_in(text: str, kind: str) -> float | None:
    """The number that a text stands for, as pydantic takes it."""
    if kind == "int":
        return int(text.strip().split(".")[0]) if re.fullmatch(r"\s*[+-]?\d+(\.0*)?\s*", text, re.ASCII) else None
    try:
        return float(text)
    except ValueError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wanted(entry: Entry) -> str:
    words = {
        "bool": "true or false",
        "int": "a whole number",
        "float": "a number",
        "text": "a text",
        "list": "a list of " + (", ".join(map(json.dumps, entry.choices)) or "texts"),
        "object": "an object",
        "section": "an object",
        "choice": "one of " + ", ".join(json.dumps(choice) for choice in entry.choices),
    }[entry.kind]
    limits = [
        f"{word} {limit:g}"
        for word, limit in (
            ("of at least", entry.least),
            ("above", entry.above),
            ("of at most", entry.most),
            ("below", entry.below),
        )
        if limit is not None
    ]
    return " ".join([words, " and ".join(limits)]).strip()
