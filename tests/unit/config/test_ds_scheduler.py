"""A scheduler section of DeepSpeed's known types becomes the loop's schedule."""

from pathlib import Path
from typing import Any

import pytest

from ds_recipes.config.schema import values_of
from tests.unit.config.settings import STAGE_3, load, problems_of, write_json

LR = {"optimizer": {"type": "AdamW", "params": {"lr": 2e-4}}}

# (type, params), the settings that come of it; the others keep their defaults
SCHEDULES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "WarmupLR",
        {"warmup_num_steps": 100, "warmup_type": "linear"},
        {"lr_decay_style": "constant", "lr_warmup": 100.0},
    ),
    (
        "WarmupLR",
        {"warmup_min_lr": 1e-6, "warmup_max_lr": 1e-3, "warmup_num_steps": 1},
        {"lr_decay_style": "constant", "lr_warmup": 2.0, "lr_warmup_style": "log", "lr_warmup_start": 1e-6, "lr": 1e-3},
    ),
    (
        "WarmupLR",
        {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "warmup_type": "auto"},
        {"lr_decay_style": "constant"},
    ),
    ("WarmupLR", {}, {"lr_decay_style": "constant", "lr_warmup": 1000.0, "lr_warmup_style": "log"}),
    (
        "WarmupDecayLR",
        {
            "warmup_min_lr": 0,
            "warmup_max_lr": 2e-4,
            "warmup_num_steps": 10,
            "total_num_steps": 1e3,
            "warmup_type": "linear",
        },
        {"lr_decay_style": "linear", "lr": 2e-4, "lr_warmup": 10.0, "lr_decay": 1000.0},
    ),
    (
        "WarmupDecayLR",
        {"warmup_min_lr": 1e-5, "warmup_max_lr": 2e-4, "warmup_num_steps": 10, "total_num_steps": "auto"},
        {
            "lr_decay_style": "linear",
            "lr": 2e-4,
            "lr_warmup": 10.0,
            "lr_warmup_style": "log",
            "lr_warmup_start": 1e-5,
            "lr_min": 1e-5,  # it falls to where the warm-up began
        },
    ),
    (
        "WarmupCosineLR",
        {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_type": "linear", "cos_min_ratio": "auto"},
        {"lr_decay_style": "cosine"},
    ),
    (
        "WarmupCosineLR",
        {"total_num_steps": 100, "warmup_num_steps": 5, "warmup_min_ratio": 0.01, "cos_min_ratio": 0.1},
        {
            "lr_decay_style": "cosine",
            "lr_decay": 100.0,
            "lr_warmup": 5.0,
            "lr_warmup_style": "log",
            "lr_warmup_start": 0.01 * 1e-4,
            "lr_min": 0.1 * 1e-4,
        },
    ),
]


def schedule(kind: str, params: dict[str, Any]) -> dict[str, Any]:
    return STAGE_3 | {"scheduler": {"type": kind, "params": params}}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("kind", "params", "changes"), SCHEDULES, ids=str)
def test_it_becomes_the_runs(kind: str, params: dict[str, Any], changes: dict[str, Any]) -> None:
    write_json(Path(), schedule(kind, params))
    config = load("--ds_config zero3.json")
    assert values_of(config) == values_of(load()) | {"ds_config": "zero3.json"} | changes


def test_ratios_are_shares_of_the_rate_that_the_run_ends_up_with() -> None:
    tree = schedule("WarmupCosineLR", {"total_num_steps": "auto", "warmup_num_steps": 5, "cos_min_ratio": 0.1})
    write_json(Path(), tree | LR)
    assert load("--ds_config zero3.json").optimizer.lr_min == pytest.approx(2e-5)
    write_json(Path(), tree)
    assert load("--ds_config zero3.json --lr 3e-4 --lr_min 3e-5").optimizer.lr_min == 3e-5 != 0.1 * 3e-4
    assert problems_of("--ds_config zero3.json --lr 1e-3 --lr_min 2e-4") == (
        (
            "zero3.json: scheduler.params.cos_min_ratio is 0.1, but --lr_min is 0.0002 (command line). Set one of them, or write "
            '"auto" in the JSON.'
        ),
    )


def test_deepspeeds_defaults_of_keys_that_are_not_there_give_way_to_the_runs() -> None:
    write_json(Path(), schedule("WarmupCosineLR", {"total_num_steps": "auto"}))
    optimizer = load("--ds_config zero3.json").optimizer
    assert (optimizer.lr_min, optimizer.lr_warmup, optimizer.lr_warmup_style) == (1e-4 * 1e-4, 1000, "log")
    given = "--lr_min 1e-5 --lr_warmup 0.1 --lr_warmup_style linear"
    optimizer = load(f"--ds_config zero3.json {given}").optimizer
    assert (optimizer.lr_min, optimizer.lr_warmup, optimizer.lr_warmup_style) == (1e-5, 0.1, "linear")


def test_what_deepspeed_would_do_otherwise_is_noted() -> None:
    write_json(Path(), schedule("WarmupDecayLR", {"total_num_steps": "auto", "warmup_type": "exp"}))
    config = load("--ds_config zero3.json")
    assert config.ds is not None and config.ds.notes == (
        'zero3.json: scheduler.params.warmup_type is "exp", which DeepSpeed reads as "log"',
        "zero3.json: scheduler.params.warmup_max_lr is missing: DeepSpeed would rise to 0.001, this run to its own lr",
    )


def test_a_warm_up_that_starts_above_its_end_is_refused() -> None:
    write_json(Path(), schedule("WarmupLR", {"warmup_min_lr": 1e-3, "warmup_num_steps": 10}))
    assert problems_of("--ds_config zero3.json") == (
        "lr_warmup_start is 0.001 (zero3.json), above lr: lr is 0.0001 (default). The warm-up rises to lr.",
    )
