"""The planner's memory against real engines on a CPU: every tensor of a rank is counted while it trains."""

from functools import cache
from pathlib import Path

import pytest

from ds_recipes.planner.memory import BETWEEN_STEPS
from ds_recipes.planner.peak import moments, worst
from ds_recipes.planner.shapes import architecture_of
from ds_recipes.planner.situation import situation_of
from ds_recipes.planner.storage import offload_bytes
from tests.ranks.launch import run_ranks
from tests.ranks.planned import LLAMA, WIDE, Case, Measured, measure_all

CLOSE = 0.10
"""How far a planned peak may be from the measured one, relative."""

LONG = ("--context_size", "1024", "--batch_size_training", "2")
SHORT = ("--context_size", "256")
CHECKPOINTED = "--activation_checkpointing"
FSDP = ("--engine", "fsdp")
FP32 = ("--precision", "fp32")
TWO_MICRO_STEPS = ("--gradient_accumulation_steps", "2")
WIDE_LIMITS = {"stage3_max_live_parameters": 1_000_000_000, "stage3_max_reuse_distance": 1_000_000_000}

EVERY_DAY: dict[str, Case] = {
    "zero3 checkpointed": Case((*SHORT, CHECKPOINTED)),
    "zero3 long": Case(("--context_size", "512")),
    "zero2": Case(SHORT, zero={"stage": 2}),
    "fsdp": Case((*FSDP, *SHORT)),
}
SLOW: dict[str, Case] = {
    "zero3 long checkpointed": Case((*LONG, CHECKPOINTED)),
    "zero3 fp32 checkpointed": Case((*SHORT, *FP32, CHECKPOINTED)),
    "zero3 tied": Case(SHORT, {**WIDE, "tie_word_embeddings": True}),
    "zero3 grouped keys": Case(("--context_size", "512"), {**LLAMA, "num_key_value_heads": 2}),
    "zero3 keeps all": Case(SHORT, zero=WIDE_LIMITS),
    "zero3 two micro-steps": Case((*SHORT, *TWO_MICRO_STEPS)),
    "zero3 eager": Case((*SHORT, "--attn_implementation", "eager")),
    "zero3 eager checkpointed": Case((*SHORT, "--attn_implementation", "eager", CHECKPOINTED)),
    "zero3 offload": Case((*SHORT, CHECKPOINTED), zero={"offload_optimizer": {"device": "cpu", "pin_memory": False}}),
    "zero3 sgd": Case((*SHORT, "--optimizer_type", "sgd")),
    "zero3 qwen3": Case(SHORT, {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32}),
    "zero3 gemma": Case(SHORT, {**LLAMA, "model_type": "gemma", "head_dim": 32, "tie_word_embeddings": True}),
    "zero2 checkpointed": Case((*SHORT, CHECKPOINTED), zero={"stage": 2}),
    "zero2 two micro-steps": Case((*SHORT, *TWO_MICRO_STEPS), zero={"stage": 2}),
    "zero2 overlapped": Case(SHORT, WIDE, {"stage": 2, "overlap_comm": True}),
    "zero2 fp32": Case((*SHORT, *FP32), zero={"stage": 2}),
    "zero1": Case(SHORT, zero={"stage": 1}),
    "zero1 two micro-steps": Case((*SHORT, *TWO_MICRO_STEPS), zero={"stage": 1}),
    "zero1 fp32": Case((*SHORT, *FP32), zero={"stage": 1}),
    "fsdp checkpointed": Case((*FSDP, *SHORT, CHECKPOINTED)),
    "fsdp long checkpointed": Case((*FSDP, *LONG, CHECKPOINTED)),
    "fsdp fp32": Case((*FSDP, *SHORT, *FP32)),
    "fsdp tied": Case((*FSDP, *SHORT), {**WIDE, "tie_word_embeddings": True}),
    "fsdp two micro-steps": Case((*FSDP, *SHORT, *TWO_MICRO_STEPS)),
    "fsdp stage 2": Case((*FSDP, *SHORT), zero={"stage": 2}),
}
OTHER_RANKS: dict[str, Case] = {
    "zero3 wide checkpointed": Case((*SHORT, CHECKPOINTED), WIDE),
    "zero2 wide": Case(SHORT, WIDE, {"stage": 2}),
    "fsdp wide checkpointed": Case((*FSDP, *SHORT, CHECKPOINTED), WIDE),
}
RUNS: dict[tuple[int, str], dict[str, Case]] = {
    (2, "every day"): EVERY_DAY,
    (2, "slow"): SLOW,
    (1, "slow"): OTHER_RANKS,
    (4, "slow"): OTHER_RANKS,
}


@cache
def measured(ranks: int, group: str, *names: str) -> list[list[Measured]]:
    """By rank and case; one start for all of them."""
    return run_ranks(measure_all, ranks, [RUNS[ranks, group][name] for name in names], timeout=300)


def of_case(ranks: int, group: str, name: str) -> list[Measured]:
    """By rank. The cases of every day share one start; a slow one has its own, so that it can fail alone."""
    together = tuple(RUNS[ranks, group]) if group == "every day" else (name,)
    return [by_case[together.index(name)] for by_case in measured(ranks, group, *together)]


def parameters() -> list[object]:
    return [
        pytest.param(ranks, group, name, marks=[pytest.mark.slow] if group == "slow" else [], id=f"{name} on {ranks}")
        for (ranks, group), cases in RUNS.items()
        for name in cases
    ]


@pytest.mark.parametrize("ranks, group, name", parameters())
def test_a_ranks_memory_is_as_planned(ranks: int, group: str, name: str, tmp_path: Path) -> None:
    """At the worst moment and between steps; the state alone nearly exactly. What is offloaded is in the same memory here."""
    case = RUNS[ranks, group][name]
    real = of_case(ranks, group, name)
    situation, _ = situation_of(case.config(tmp_path), 1, ranks, "cpu")
    model = architecture_of(case.model, name)
    found = moments(model, situation)
    on_host, _ = offload_bytes(model, situation)
    (between,) = (moment.parts for moment in found if moment.name == BETWEEN_STEPS)
    state = between.optimizer or (situation.master_bytes + situation.moment_bytes) * model.numel / ranks
    print(
        f"{name} on {ranks}: peak {worst(found).parts.total + on_host:,.0f} planned, {max(one.peak for one in real):,} measured, "
        f"{(worst(found).parts.total + on_host) / max(one.peak for one in real) - 1:+.1%} ({worst(found).name})"
    )
    assert worst(found).parts.total + on_host == pytest.approx(max(one.peak for one in real), rel=CLOSE)
    assert between.total + on_host == pytest.approx(max(one.between for one in real), rel=0.02)
    assert state == pytest.approx(max(one.state for one in real), rel=0.02)
