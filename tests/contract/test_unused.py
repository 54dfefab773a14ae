"""Parameters without a gradient keep weight, moments and step count, as torch.optim has it: on both engines, at all stages."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.checkpoint.load import CheckpointReader
from ds_recipes.checkpoint.manifest import read_manifest
from ds_recipes.checkpoint.store import save_checkpoint
from ds_recipes.config.plan import make_plan
from ds_recipes.engine.base import Engine
from ds_recipes.engine.create import create_engine
from ds_recipes.world.group import World
from tests.contract import switched
from tests.contract.engines import Case, settings
from tests.contract.oracle import joined
from tests.contract.switched import CLIP, FIRST_ROUTED, LR, NAMES_USED, ROWS, STEPS, Switch, SwitchedOracle, used_in
from tests.contract.zero_states import OFFLOAD, zero
from tests.ranks.launch import run_ranks

ADAM = Case(optimizer="adamw", rows=ROWS, weight_decay=switched.WEIGHT_DECAY, clip=CLIP)
DAILY = {
    "fsdp": replace(ADAM, engine="fsdp"),
    "3, small sub-groups": replace(ADAM, ds=zero(3, sub_group_size=5000)),
    "2, offloaded": replace(ADAM, ds=zero(2, **OFFLOAD)),
    "1, bf16": replace(ADAM, ds=zero(1), precision="bf16"),
}
SLOW = {
    "3": replace(ADAM, ds=zero(3, stage3_param_persistence_threshold=0)),
    "3, offloaded": replace(ADAM, ds=zero(3, **OFFLOAD)),
    "3, computed again": replace(ADAM, ds=zero(3), checkpointing=True),
    "2": replace(ADAM, ds=zero(2)),
    "2, computed again": replace(ADAM, ds=zero(2), checkpointing=True),
    "1": replace(ADAM, ds=zero(1)),
    "fsdp, bf16": replace(ADAM, engine="fsdp", precision="bf16"),
}
CASES = DAILY | SLOW
HALF = FIRST_ROUTED - 1
"""The step after which checkpoints are made: expert 2 has had no token then, and expert 1 in every other step."""

DAILY_RESUMED = [
    ("3, small sub-groups", "3, small sub-groups", 2),
    ("fsdp", "3, small sub-groups", 2),
    ("3, small sub-groups", "2, offloaded", 2),
    ("2, offloaded", "fsdp", 1),
]
SLOW_RESUMED = [
    *((name, name, 2) for name in ("3", "3, offloaded", "2", "1")),
    ("3, offloaded", "1", 2),
    ("1", "3", 2),
    ("2", "3, offloaded", 1),
    ("3", "2", 1),
]


def every_day(daily: Iterable[Any], slow: Iterable[Any]) -> list[Any]:
    """Parameters of a test, the second lot marked as slow."""
    return [
        *daily,
        *(pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.slow) for one in slow),
    ]


def engine_of(world: World, case: Case, tmp: str) -> Engine:
    config = settings(case, Path(tmp))
    return create_engine(config, make_plan(config, world.size), switched.source(), world)


def take(engine: Engine, world: World, step: int) -> dict[str, Any]:
    """One step; what was left alone, and whether every bit of it was."""
    before = state_of(engine)
    rows = switched.rows_of_rank(step, world.rank, world.size)
    (targets,) = world.sum([sum(row.num_target_tokens for _, row in rows)])
    for number, row in rows:
        Switch.on = used_in(step, number)
        engine.backward(joined([row]), 1 / targets)
    result = engine.update(LR)
    after = state_of(engine)
    same = {name: all(map(torch.equal, mine, after[name])) for name, mine in before.items()}
    moved = [name for name, is_same in same.items() if name in result.unused and not is_same]
    still = [name for name in before if name not in result.unused and torch.equal(before[name][0], after[name][0])]
    return {"norm": result.grad_norm, "unused": result.unused, "moved": moved, "still": still}


def state_of(engine: Engine) -> dict[str, list[torch.Tensor]]:
    """This rank's ranges of weights and moments, as copies; those of parameters that it holds nothing of are left out."""
    return {
        shard.name: [one.clone() for one in (shard.fp32, shard.exp_avg, shard.exp_avg_sq) if one is not None]
        for shard in engine.shards()
        if shard.length
    }


def end_of(engine: Engine, world: World) -> dict[str, Any]:
    weights = {name: tensor.clone() for name, tensor in engine.weights()}
    steps = {name: engine.optimizer_step - engine.usage.missed.get(name, 0) for name in weights}
    return {"weights": weights if world.rank == 0 else {}, "steps_of": steps}


def trained(world: World, tmp: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Each case from the first weights to the end, with a checkpoint on the way."""
    found = {}
    for name in names:
        engine = engine_of(world, CASES[name], tmp)
        engine.load_shards(switched.source().initial_weights(world.device))
        before = {key: tensor.clone() for key, tensor in engine.weights()}
        steps = []
        for step in range(1, STEPS + 1):
            steps.append(take(engine, world, step))
            if step == HALF:
                probe = (torch.zeros((1, 2), dtype=torch.int64), torch.zeros((1, 2, 3)))
                save_checkpoint(
                    Path(tmp) / name, step, engine, state={"step": step}, files={}, probe=probe, tied={}, world=world,
                    save_optimizer=True, keep_last=None,
                )  # fmt: skip
        found[name] = {"before": before, "steps": steps, **end_of(engine, world)}
        engine.close()
    return found


def resumed(world: World, tmp: str, from_to: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The second half of one case from another one's checkpoint."""
    found = {}
    for origin, name in from_to:
        path = Path(tmp) / origin / f"iter_{HALF:07d}"
        engine = engine_of(world, CASES[name], tmp)
        engine.load_shards(CheckpointReader(path, read_manifest(path)))
        steps = [take(engine, world, step) for step in range(HALF + 1, STEPS + 1)]
        found[origin, name] = {"steps": steps, **end_of(engine, world)}
        engine.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("unused"))


@cache
def reports(folder: str, is_daily: bool) -> list[dict[str, dict[str, Any]]]:
    """Every case of a day, or all others, on two ranks in one start, by rank."""
    return run_ranks(trained, 2, folder, list(DAILY if is_daily else SLOW), timeout=240)


def seen(folder: str, name: str) -> list[dict[str, Any]]:
    return [rank[name] for rank in reports(folder, name in DAILY)]


@cache
def continued(folder: str, is_daily: bool, ranks: int) -> dict[tuple[str, str], dict[str, Any]]:
    lot = DAILY_RESUMED if is_daily else SLOW_RESUMED
    for lies_in in {origin in DAILY for origin, _, _ in lot}:
        reports(folder, lies_in)
    pairs = [(origin, name) for origin, name, on in lot if on == ranks]
    report: dict[tuple[str, str], dict[str, Any]] = run_ranks(resumed, ranks, folder, pairs, timeout=240)[0]
    return report


@cache
def expected(folder: str) -> dict[str, Any]:
    """torch's AdamW on one process."""
    first = seen(folder, "fsdp")[0]["before"]
    oracle = SwitchedOracle(first)
    norms = [oracle.take(step) for step in range(1, STEPS + 1)]
    steps_of = {name: oracle.steps_of(name) for name in first}
    return {"first": first, "norms": norms, "weights": oracle.weights(), "steps_of": steps_of}


def unused_in(folder: str, step: int) -> set[str]:
    """By the model's own account."""
    used = frozenset().union(*(used_in(step, row) for row in range(ROWS - 1)))  # the last row has no target
    parts = [part for what, part in NAMES_USED.items() if what not in used] + [".tower."]
    return {name for name in expected(folder)["first"] if any(part in name for part in parts)}


def check_end(folder: str, report: dict[str, Any]) -> None:
    """Each parameter ends where torch.optim leaves it.

    But for three elements: Adam enlarges the rounding errors of a gradient that is nearly zero.
    """
    oracle = expected(folder)
    assert report["steps_of"] == oracle["steps_of"]
    for name, weight in oracle["weights"].items():
        way = weight.double() - oracle["first"][name]
        apart = (report["weights"][name].double() - weight.double()).flatten().abs().sort().values[:-3]
        assert float(apart.norm()) <= 1e-3 * float(way.norm()), name


@pytest.mark.parametrize("name", every_day(DAILY, SLOW))
def test_what_is_unused_is_agreed_and_left_alone_in_every_bit(folder, name):
    for rank in seen(folder, name):
        for step, report in enumerate(rank["steps"], 1):
            assert report["unused"] == unused_in(folder, step), step
            assert not report["moved"], step
            if CASES[name].precision == "fp32":
                assert not report["still"], step


@pytest.mark.parametrize(
    "name", [name for name in DAILY if "bf16" not in name] + every_day((), [n for n in SLOW if "bf" not in n])
)
def test_norms_weights_and_step_counts_are_those_of_torch_optim(folder, name):
    report = seen(folder, name)[0]
    assert [step["norm"] for step in report["steps"]] == pytest.approx(expected(folder)["norms"], rel=1e-5)
    check_end(folder, report)


def test_the_late_expert_begins_to_count_with_its_first_step(folder):
    counts = expected(folder)["steps_of"]
    late = [count for name, count in counts.items() if ".experts.2." in name]
    assert late and set(late) == {3} and max(counts.values()) == STEPS
    assert {count for name, count in counts.items() if ".experts.1." in name} == {STEPS // 2}
    assert {count for name, count in counts.items() if ".side." in name} == {3}


@pytest.mark.parametrize("origin, name, ranks", every_day(DAILY_RESUMED, SLOW_RESUMED))
def test_a_resumed_run_goes_on_with_each_parameter_s_own_count(folder, origin, name, ranks):
    report = continued(folder, (origin, name, ranks) in DAILY_RESUMED, ranks)[origin, name]
    check_end(folder, report)
    if origin == name:
        straight = seen(folder, name)[0]
        assert [one["norm"] for one in report["steps"]] == [one["norm"] for one in straight["steps"][HALF:]]
        assert all(torch.equal(weight, straight["weights"][key]) for key, weight in report["weights"].items())


@pytest.mark.parametrize("name", every_day(DAILY, SLOW))
def test_a_checkpoint_keeps_the_counts_that_are_behind(folder, name):
    seen(folder, name)
    missed = Counter(key for step in range(1, HALF + 1) for key in unused_in(folder, step))
    assert read_manifest(Path(folder) / name / f"iter_{HALF:07d}").missed_steps == missed
