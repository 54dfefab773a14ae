"""The comparison as text for people and as JSON for programs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ds_recipes.fsops.durable import replace_file
from ds_recipes.training.compare.measure import WARMUP_STEPS, Measured
from ds_recipes.training.compare.verdict import Verdict
from ds_recipes.training.run_record import versions

SHOWN_STEPS = 20


def lines(one: Measured, other: Measured, verdict: Verdict, on_gpu: bool) -> list[str]:
    """What the tool prints."""
    return [
        *_steps(one, other),
        "",
        *_costs(one, other, on_gpu),
        "",
        f"losses: at most {verdict.loss_difference:.1e} nats apart, at step {verdict.loss_step} (allowed: "
        f"{verdict.loss_bound:.1e}, for {verdict.bound_from})",
        f"gradient norms: {verdict.first_norm_difference:.1e} apart at step 1, from the same weights (allowed: "
        f"{verdict.first_norm_bound:.0e}); at most {verdict.largest_norm_difference:.1e} later, relative",
        f"weights: {verdict.weight_difference:.1e} of their way apart after the last step (allowed: {verdict.weight_bound:.1e}), "
        f"most in {verdict.farthest}",
        "",
        *(f"- {reason}" for reason in verdict.reasons),
        "the engines agree" if verdict.agree else "THE ENGINES DO NOT AGREE",
    ]


def _steps(one: Measured, other: Measured) -> list[str]:
    first, second = one.engine, other.engine
    head = f"{'step':>5}  {'lr':>9}  {f'loss {first}':>15}  {f'loss {second}':>12}  {'apart':>8}"
    head += f"  {f'norm {first}':>15}  {f'norm {second}':>12}"
    every = max(1, -(-len(one.steps) // SHOWN_STEPS))
    shown = []
    for number, (mine, theirs) in enumerate(zip(one.steps, other.steps, strict=True), 1):
        if number == 1 or number % every == 0 or number == len(one.steps):
            shown.append(
                f"{number:>5}  {mine.lr:>9.3e}  {mine.loss:>15.6f}  {theirs.loss:>12.6f}  "
                f"{abs(mine.loss - theirs.loss):>8.1e}  {mine.grad_norm:>15.6f}  {theirs.grad_norm:>12.6f}"
                + ("" if mine.applied and theirs.applied else "  skipped")
            )
    return [head, *shown]


def _costs(one: Measured, other: Measured, on_gpu: bool) -> list[str]:
    memory = "GPU memory, GiB a rank" if on_gpu else "resident memory, GiB a rank"
    keys = [key for key in {**one.description, **other.description} if key not in ("engine", "attention")]
    rows: list[tuple[str, ...]] = [
        ("", one.engine, other.engine),
        (f"tokens/s (from step {WARMUP_STEPS + 1})", _rate(one), _rate(other)),
        (f"{memory} (peak)", f"{one.memory_gib:.2f}", f"{other.memory_gib:.2f}"),
        *((key.replace("_", " "), *(_said(each, key) for each in (one, other))) for key in keys),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{name:<{widths[0]}}  {mine:<{widths[1]}}  {theirs}".rstrip() for name, mine, theirs in rows]


def _said(one: Measured, key: str) -> str:
    value = one.description.get(key)
    return "-" if value in (None, [], "") else str(value)


def _rate(one: Measured) -> str:
    return "-" if one.tokens_per_sec is None else f"{one.tokens_per_sec:,.0f}"


def write_json(path: Path, one: Measured, other: Measured, verdict: Verdict, world_size: int) -> None:
    """Everything that was measured, with the versions of what it was measured with."""
    tree: dict[str, Any] = {
        "agree": verdict.agree,
        "world_size": world_size,
        "verdict": dataclasses.asdict(verdict),
        "engines": [dataclasses.asdict(dataclasses.replace(each, updates={})) for each in (one, other)],
        "versions": versions(),
    }
    replace_file(path, (json.dumps(tree, indent=2) + "\n").encode())
