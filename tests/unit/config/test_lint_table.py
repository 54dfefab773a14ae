"""The table of DeepSpeed's keys is what the installed DeepSpeed says, and the linter's verdict on any value is DeepSpeed's."""

import tomllib
from typing import Any

from ds_recipes.config.ds.table import FILE, Entry, ds_table
from ds_recipes.config.ds.table_check import more_problems, table_problems
from ds_recipes.config.lint.report import ERROR, UNSUPPORTED, WARNING, lint_tree
from tests.unit.config.lint_oracle import ROOT, STARTS, STOPS, deepspeed_says, sweep

AT_START = {
    "optimizer.type", "scheduler.type", "data_types.grad_accum_dtype", "data_types.param_dtype", "data_types.buffer_dtype",
    "gradient_clipping",
}  # fmt: skip
"""DeepSpeed reads any value of these and stops when its engine starts: no class of that name, no such dtype, `"x" > 0`."""

NOT_FOR_A_FILE = {"tensor_parallel.dtype", "aio.use_gds"}
"""Refused on any text since it takes an object of Python's, and refused on a machine without CUDA."""

ODD = {
    "timers": "any text is taken, since no section is found in it",
    "torch_autocast.lower_precision_safe_modules": "any text is taken, as a list of letters",
    "vocabulary_size": "a text fails in the formatting of a hint",
    "sequence_parallel_size": "half a rank is taken",
    "train_micro_batch_size_per_gpu": "half a row is taken",
    "gradient_accumulation_steps": "half a step is taken",
    "data_efficiency.data_sampling.dynamic_batching.min_batch_size": "int() is called on it; the section is refused here",
    "data_efficiency.data_sampling.dynamic_batching.max_batch_size": "int() is called on it; the section is refused here",
}
"""Where DeepSpeed's verdict is an accident, and why."""

REFUSED_LATER = (
    "nvme_path: is missing", "bf16_master_weights_and_grads: needs bf16_optimizer_states", "is another type than",
)  # fmt: skip
"""Combinations at which DeepSpeed stops when its optimizer is made (stage3.py, base_optimizer.py, engine.py)."""


def is_compared(entry: Entry, value: Any) -> bool:
    is_odd = entry.path in AT_START | NOT_FOR_A_FILE or entry.path in ODD
    is_left_open = value == "auto" and not entry.checked  # programs fill it, each in its own way
    is_filtered = value == "auto" and entry.path in ("tensorboard", "wandb", "csv_monitor", "comet")
    return not is_odd and not is_left_open and not is_filtered


def test_the_table_is_what_the_generator_makes_of_the_installed_deepspeed() -> None:
    assert FILE.read_text(encoding="utf-8") == deepspeed_says()["table"], "run tools/make_ds_table.py"


def test_the_table_is_installed_with_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert FILE.name in settings["package-data"]["ds_recipes.config.ds"]


def test_every_key_is_explained_in_a_line() -> None:
    keys = ds_table().keys
    assert len(keys) > 330
    for path, entry in keys.items():
        assert 5 <= len(entry.about) < 150 and entry.about.endswith("."), path


def test_the_verdict_on_every_value_of_every_key_is_deepspeeds() -> None:
    accepted = deepspeed_says()["sweep"]
    differ = []
    compared = 0
    for (entry, value, tree), is_accepted in zip(sweep(), accepted, strict=True):
        if not is_compared(entry, value):
            continue
        compared += 1
        errors = [
            str(line) for line in lint_tree(tree).of(ERROR) if not any(text in str(line) for text in REFUSED_LATER)
        ]
        if is_accepted == bool(errors):
            differ.append((tree, is_accepted, errors))
    assert differ[:9] == []
    assert compared > 11_000 and 0.2 < sum(accepted) / len(accepted) < 0.9


def test_what_stops_deepspeeds_engine_is_named() -> None:
    assert deepspeed_says()["started"] == dict.fromkeys(STARTS, True) | dict.fromkeys(STOPS, False)
    for tree in STARTS.values():
        report = lint_tree(tree)
        assert not report.of(ERROR) and not report.of(WARNING)
    for key, tree in STOPS.items():
        report = lint_tree(tree)
        assert key in {line.key for level in (ERROR, UNSUPPORTED, WARNING) for line in report.of(level)}, key


def test_more_problems_says_nothing_twice() -> None:
    tree = {"compile": {"deepcompile": "x"}, "fp16": {"enabled": "x"}}
    lines = [str(each) for each in table_problems(tree)]
    assert more_problems(tree, []) == lines and len(lines) == 2
    assert more_problems(tree, ["fp16.enabled must be true"]) == lines[:1]
