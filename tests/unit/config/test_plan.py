"""The plan's arithmetic, for 1 to 64 ranks: nothing is dropped, nothing is rounded behind the user's back."""

import re
from pathlib import Path

import pytest

from ds_recipes.config.plan import Plan, make_plan
from ds_recipes.errors import ConfigError
from tests.unit.config.settings import load, write_json

WORLDS = range(1, 65)


def plan(flags: str, world_size: int = 1, rows_per_epoch: int | None = None) -> Plan:
    return make_plan(load(flags), world_size, rows_per_epoch)


def problem(flags: str, world_size: int = 1, rows_per_epoch: int | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        plan(flags, world_size, rows_per_epoch)
    (line,) = error.value.problems
    return line


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_step_is_ranks_times_micro_steps_times_rows(world_size: int) -> None:
    for rows, micro_steps in ((1, 1), (3, 5), (8, 2)):
        made = plan(
            f"--batch_size_training {rows} --gradient_accumulation_steps {micro_steps} --context_size 100", world_size
        )
        assert made.global_rows == rows * micro_steps * world_size
        assert made.tokens_per_step == made.global_rows * 100
        assert (made.rows_per_rank, made.micro_steps, made.world_size) == (rows, micro_steps, world_size)


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_global_batch_is_met_exactly_or_refused_with_sizes_that_work(world_size: int) -> None:
    for wanted in (1, 12, 48, 64, 96, 100, 1920):
        for rows in (1, 2, 5):
            flags = f"--global_batch_size {wanted} --batch_size_training {rows}"
            if wanted % (rows * world_size) == 0:
                assert plan(flags, world_size).global_rows == wanted
                continue
            advice = problem(flags, world_size)
            for name, sizes in re.findall(r"(global_batch_size|batch_size_training) to (\d+(?: or \d+)?)", advice):
                for size in re.findall(r"\d+", sizes):
                    changed = {"global_batch_size": wanted, "batch_size_training": rows} | {name: int(size)}
                    fixed = " ".join(f"--{key} {value}" for key, value in changed.items())
                    assert plan(fixed, world_size).global_rows == changed["global_batch_size"], advice


@pytest.mark.parametrize("world_size", WORLDS)
def test_epochs_end_with_a_step_that_holds_the_last_row_and_less_than_one_step_of_blanks(world_size: int) -> None:
    for rows_per_epoch in (1, 7, 64, 1001):
        made = plan(
            "--num_epochs 3 --batch_size_training 2 --gradient_accumulation_steps 3", world_size, rows_per_epoch
        )
        assert made.total_rows == 3 * rows_per_epoch
        assert made.total_steps is not None
        assert 0 <= made.total_steps * made.global_rows - made.total_rows < made.global_rows


def test_without_any_length_one_epoch_is_trained() -> None:
    assert plan("", 2, 10).total_rows == 10
    assert plan("", 2, 10).total_steps == 5


def test_steps_alone_do_not_end_at_an_epoch() -> None:
    made = plan("--max_steps 100", 2, 10)
    assert (made.total_rows, made.total_steps) == (None, 100)


def test_an_unknown_epoch_leaves_the_length_open() -> None:
    made = plan("--num_epochs 2")
    assert (made.total_rows, made.total_steps, made.warmup_steps, made.decay_steps) == (None, None, None, None)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ("--num_epochs 2", 20),
        ("--num_epochs 2 --max_steps 7", 7),
        ("--num_epochs 2 --max_steps 70", 20),
        ("--max_tokens 100 --context_size 10", 10),
        ("--max_tokens 101 --context_size 10", 11),
        ("--max_tokens 1 --context_size 10", 1),
        ("--num_epochs 2 --max_steps 15 --max_tokens 120 --context_size 10", 12),
    ],
)
def test_the_first_limit_reached_ends_the_run(flags: str, steps: int) -> None:
    assert plan(flags, 1, 10).total_steps == steps


@pytest.mark.parametrize(
    ("flags", "warmup", "decay"),
    [
        ("", 0, 100),
        ("--lr_warmup 0.05 --lr_decay 0.8", 5, 80),
        ("--lr_warmup 10 --lr_decay 50", 10, 50),
        ("--lr_warmup 0.3 --lr_decay 0.7", 30, 70),
        ("--lr_warmup 0.999 --lr_decay 1", 99, 100),
        ("--lr_decay_style linear --lr_decay 500", 0, 500),
        ("--lr_decay_style wsd", 0, 10),
        ("--lr_decay_style wsd --lr_warmup 0.5 --lr_decay 0.5", 50, 50),
        ("--lr_decay_style constant --lr_warmup 99 --lr_decay 0.5", 99, None),
        ("--lr_decay_style constant --lr_warmup 100 --lr_warmup_style log", 100, None),
        ("--lr_decay_style inverse_sqrt --lr_warmup 20", 20, None),
    ],
)
def test_the_learning_rates_phases_in_steps(flags: str, warmup: int, decay: int | None) -> None:
    made = plan(f"--max_steps 100 {flags}")
    assert (made.warmup_steps, made.decay_steps) == (warmup, decay)


def test_rounding_never_makes_phases_meet() -> None:
    for total in range(1, 200):
        for warmup in (0.0, 0.01, 0.05, 0.1, 0.3, 0.5):
            for decay in (0.51, 0.7, 1.0):
                made = plan(f"--max_steps {total} --lr_warmup {warmup} --lr_decay {decay}")
                assert made.warmup_steps is not None and made.decay_steps is not None
                assert 0 <= made.warmup_steps < made.decay_steps <= total


PROBLEMS = {
    ("--global_batch_size 10 --batch_size_training 4", 4): (
        "--global_batch_size is 10 (command line), but one micro-step takes 16 rows (batch_size_training 4 x 4 ranks): "
        "gradient accumulation would be below 1. Set global_batch_size to 16."
    ),
    ("--global_batch_size 40 --batch_size_training 3", 4): (
        "--global_batch_size is 40 (command line), but one micro-step takes 12 rows (batch_size_training 3 x 4 ranks): that is "
        "no whole number of micro-steps. Set global_batch_size to 36 or 48, or batch_size_training to 2 or 5."
    ),
    ("--global_batch_size 7 --batch_size_training 2", 1): (
        "--global_batch_size is 7 (command line), but one micro-step takes 2 rows (batch_size_training 2 x 1 rank): that is no "
        "whole number of micro-steps. Set global_batch_size to 6 or 8, or batch_size_training to 1 or 7."
    ),
    ("--global_batch_size 16 --gradient_accumulation_steps 2 --batch_size_training 2", 2): (
        "--global_batch_size is 16 (command line), but --gradient_accumulation_steps is 2 (command line): with "
        "batch_size_training 2 x 2 ranks that makes 8 rows a step. Leave out one of the two, or set "
        "gradient_accumulation_steps to 4."
    ),
    ("--max_steps 20 --lr_warmup 2000", 1): (
        "--lr_warmup is 2000.0 (command line), so 2000 steps, but the run has 20: the learning rate would never reach lr. Set "
        "fewer steps, or a fraction of the run such as 0.05."
    ),
    ("--max_steps 20 --lr_warmup 20 --lr_decay_style constant", 1): (
        "--lr_warmup is 20.0 (command line), so 20 steps, but the run has 20: the learning rate would never reach lr. Set "
        "fewer steps, or a fraction of the run such as 0.05."
    ),
    ("--max_steps 100 --lr_warmup 50 --lr_decay 0.5", 1): (
        "lr_decay ends the decay at step 50, but lr_warmup ends the warm-up at step 50 of 100. Both are counted from the start "
        "of the run: set lr_decay above lr_warmup."
    ),
    ("--max_steps 100 --lr_warmup 50 --lr_decay 0.6 --lr_decay_style wsd", 1): (
        "the warm-up of 50 steps and the decay of 60 steps at the end do not fit into a run of 100 steps. Set lr_warmup or "
        "lr_decay to less; fractions of the run must not sum to more than 1."
    ),
}


@pytest.mark.parametrize(("flags", "world_size"), PROBLEMS)
def test_what_does_not_fit_is_one_line(flags: str, world_size: int) -> None:
    assert problem(flags, world_size) == PROBLEMS[flags, world_size]


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_ranks_divide_into_the_groups_of_the_json_or_that_is_refused(
    world_size: int, engine: str, tmp_path: Path
) -> None:
    write_json(tmp_path, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}})
    flags = f"--engine {engine} --ds_config {tmp_path}/zero3.json"
    if world_size <= 8 or world_size % 8 == 0:
        assert plan(flags, world_size).world_size == world_size
    else:
        assert problem(flags, world_size) == (
            f"{tmp_path}/zero3.json: zero_optimization.zero_hpz_partition_size is 8, but {world_size} ranks do not divide into "
            "groups of 8. Set it to the number of GPUs of a node, or start a multiple of it in ranks."
        )
