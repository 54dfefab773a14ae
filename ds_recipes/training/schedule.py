"""The learning rate: a pure function of the step, so that a resumed run needs no scheduler state.

`step` counts the updates done before this one, from 0. Linear warm-up over W steps gives step s the rate
lr x (s + 1) / (W + 1): the first update is not wasted on a rate of 0, and step W is the first at lr itself (nanoGPT's
convention; Megatron-LM starts at 0 and wastes one). Every course then starts at exactly lr in step W, and those that
decay are at lr_min from their last step on. A run whose decay ends with the run takes its last update just above
lr_min, so with lr_min 0 that update is not wasted either.
"""

import math

from ds_recipes.config.plan import Plan


def lr_at(step: int, plan: Plan) -> float:
    """Return the learning rate of update `step` (from 0) for the plan's course.

    - cosine: half a cosine from lr to lr_min (Loshchilov and Hutter, arXiv 1608.03983, without restarts).
    - linear: a straight line from lr to lr_min (as BERT, arXiv 1810.04805).
    - constant: lr.
    - wsd: lr, then a straight line to lr_min over the last `decay_steps` steps (warm-up, stable, decay: MiniCPM,
      arXiv 2404.06395; the linear end: arXiv 2405.18392).
    - inverse_sqrt: lr x sqrt(W / step), never below lr_min (arXiv 1706.03762); without warm-up W counts as 1.

    The warm-up is the same in all of them: from lr_warmup_start in a straight line (arXiv 1706.02677), or as the logarithm.
    """
    assert step >= 0 and plan.warmup_steps is not None
    if step < plan.warmup_steps:
        return _warming_up(step, plan, plan.warmup_steps)
    if plan.lr_decay_style == "inverse_sqrt":
        warmup_steps = max(plan.warmup_steps, 1)
        since_warmup = step - plan.warmup_steps
        return max(plan.lr * math.sqrt(warmup_steps / (warmup_steps + since_warmup)), min(plan.lr_min, plan.lr))
    return plan.lr_min + (plan.lr - plan.lr_min) * _remaining(step, plan, plan.warmup_steps)


def _warming_up(step: int, plan: Plan, warmup_steps: int) -> float:
    """The rate in the warm-up; the log form is DeepSpeed's (runtime/lr_schedules.py), log(i + 1) / log(W), counted as here."""
    rise = plan.lr - plan.lr_warmup_start
    if plan.lr_warmup_style == "log":
        return plan.lr_warmup_start + rise * math.log(step + 2) / math.log(warmup_steps + 1)
    return plan.lr_warmup_start + rise * (step + 1) / (warmup_steps + 1)


def _remaining(step: int, plan: Plan, warmup_steps: int) -> float:
    """Share of the way from lr_min up to lr that is left at `step`: 1 until the decay starts, 0 after its end."""
    if plan.lr_decay_style == "constant":
        return 1.0
    assert plan.decay_steps is not None and plan.total_steps is not None
    if plan.lr_decay_style == "wsd":
        return 1.0 - _progress(step, plan.total_steps - plan.decay_steps, plan.total_steps)
    progress = _progress(step, warmup_steps, plan.decay_steps)
    return 1.0 - progress if plan.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def _progress(step: int, first: int, last: int) -> float:
    """0 up to step `first`, 1 from step `last` on, linear between; a phase without steps is over at once."""
    return min(max((step - first) / (last - first), 0.0), 1.0) if last > first else float(step >= last)
