"""Batch arithmetic of a DeepSpeed JSON for a number of ranks, as DeepSpeed does it, with the values that would divide."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_recipes.config.ds.table_check import Finding

TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
SEQUENCE = "sequence_parallel_size"
DOCUMENT = "https://www.deepspeed.ai/docs/config-json/#batch-size-related-parameters"


@dataclass(frozen=True)
class Batch:
    """What a step will be in words, and what is wrong with it."""

    words: str
    problems: tuple[Finding, ...] = ()


def check_batch(tree: Mapping[str, Any], world: int | None) -> Batch:
    """Work out a step. `world`: ranks, or None where they are not known."""
    given = {name: _count(tree.get(name)) for name in (TRAIN, MICRO, STEPS)}
    known = {name: value for name, value in given.items() if value is not None}
    wrong = tuple(Finding(name, f"is {value}: it must be above 0") for name, value in known.items() if value < 1)
    if wrong:
        return Batch("", wrong)
    if world is None:
        return _without_world(known)
    sequence = _count(tree.get(SEQUENCE)) or 1
    if world % sequence:
        near = _around(sequence, world)
        return Batch("", (Finding(SEQUENCE, f"is {sequence}, which does not divide {world} ranks. {near}"),))
    return _with_world(
        known, world // sequence, f"{world} ranks" if sequence == 1 else f"{world // sequence} groups of ranks"
    )


def _without_world(known: Mapping[str, int]) -> Batch:
    if len(known) < 3:
        return Batch("")
    rows = known[MICRO] * known[STEPS]
    if known[TRAIN] % rows == 0:
        return Batch(
            f"{known[TRAIN]} rows a step = {known[MICRO]} x {known[STEPS]} x {known[TRAIN] // rows} ranks; no others"
        )
    text = (
        f"is {known[TRAIN]}, which no number of ranks gives with {MICRO} {known[MICRO]} and {STEPS} {known[STEPS]} "
        f"({DOCUMENT}). {_nearest(known[TRAIN], rows)}"
    )
    return Batch("", (Finding(TRAIN, text),))


def _with_world(known: Mapping[str, int], world: int, ranks: str) -> Batch:
    train, micro, steps = (known.get(name) for name in (TRAIN, MICRO, STEPS))
    if train is None and micro is None:
        return Batch(f"the run sets the rows of a step over {ranks}")
    if train is None:
        assert micro is not None
        rows = micro * (steps or 1)
        return Batch(f"{rows * world} rows a step = {micro} a rank x {steps or 1} micro-batches x {ranks}")
    unit = world * (micro or 1) * (steps or 1)
    if train % unit:
        parts = [f"{name} {value}" for name, value in ((MICRO, micro), (STEPS, steps)) if value is not None]
        with_parts = f" with {' and '.join(parts)}" if parts else ""
        text = f"is {train}, which does not divide over {ranks}{with_parts} ({DOCUMENT}). {_nearest(train, unit)}"
        return Batch("", (Finding(TRAIN, text),))
    if micro is not None and steps is not None and train != unit:
        text = (
            f"is {train}, but {MICRO} {micro} x {STEPS} {steps} x {ranks} is {unit} ({DOCUMENT}). Write {unit}, or "
            f"{STEPS} {train // (micro * world)}, or leave one of them out"
        )
        return Batch("", (Finding(TRAIN, text),))
    rows = train // world
    micro = micro or rows // (steps or 1)
    return Batch(f"{train} rows a step = {micro} a rank x {rows // micro} micro-batches x {ranks}")


def _nearest(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"Write {below} or {below + unit}" if below else f"Write {unit}"


def _around(part: int, world: int) -> str:
    divisors = [each for each in range(1, world + 1) if world % each == 0]
    near = sorted(sorted(divisors, key=lambda each: abs(each - part))[:2])
    return f"Write {' or '.join(map(str, near))}"


def _count(value: Any) -> int | None:
    """A whole number, or None for "auto", for nothing, and for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        return None
    return int(value)
