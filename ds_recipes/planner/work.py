"""Arithmetic, time and cost of a run, at a stated share of the GPUs' peak."""

from dataclasses import dataclass

from ds_recipes.config.plan import Plan
from ds_recipes.planner.architecture import Architecture

SECONDS_AN_HOUR = 3600.0


def flops_per_token(model: Architecture, context_size: int) -> float:
    """Flops to train one token, as `models/flops.py` counts them, which needs torch; a test holds the two equal."""
    tables = model.embeddings[:1] + tuple(one for one in model.embeddings if one.name == "positions")
    matrices = sum(
        one.numel * one.share
        for one in model.parameters
        if len(one.shape) >= 2 and not any(one is table for table in tables)
    )
    if model.tied:
        matrices += model.embeddings[0].numel
    return 6.0 * round(matrices) + 12.0 * len(model.blocks) * model.heads * model.head_size * context_size


@dataclass(frozen=True)
class Work:
    """One optimizer step, and the run where its length is known."""

    flops_per_token: float
    tokens_per_step: int
    total_steps: int | None
    step_seconds: float
    gpus: int
    gpus_per_node: int
    price_per_gpu_hour: float | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def total_tokens(self) -> int | None:
        return None if self.total_steps is None else self.total_steps * self.tokens_per_step

    @property
    def hours(self) -> float | None:
        return None if self.total_steps is None else self.total_steps * self.step_seconds / SECONDS_AN_HOUR

    @property
    def node_hours(self) -> float | None:
        """What a cluster's points are counted in."""
        return None if self.hours is None else self.hours * self.gpus / self.gpus_per_node

    @property
    def cost(self) -> float | None:
        if self.hours is None or self.price_per_gpu_hour is None:
            return None
        return self.hours * self.gpus * self.price_per_gpu_hour


def work_of(
    model: Architecture, plan: Plan, gpus_per_node: int, peak_tflops: float, mfu: float, price: float | None
) -> Work:
    """`peak_tflops` is one GPU's, `mfu` the share of it that the model's own arithmetic gets."""
    per_token = flops_per_token(model, plan.context_size)
    seconds = per_token * plan.tokens_per_step / (plan.world_size * peak_tflops * 1e12 * mfu)
    return Work(
        flops_per_token=per_token,
        tokens_per_step=plan.tokens_per_step,
        total_steps=plan.total_steps,
        step_seconds=seconds,
        gpus=plan.world_size,
        gpus_per_node=gpus_per_node,
        price_per_gpu_hour=price,
    )
