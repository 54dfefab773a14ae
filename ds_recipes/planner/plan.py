"""Everything that is said about a run before it is queued, as one object."""

from dataclasses import dataclass, replace
from typing import Any

from ds_recipes.config.plan import Plan, make_plan
from ds_recipes.config.schema import Config
from ds_recipes.planner.find import Found
from ds_recipes.planner.machine import CONTEXT_BYTES, FRAGMENTATION, needed_bytes
from ds_recipes.planner.memory import Activations, Moment
from ds_recipes.planner.outlook import Cluster, Suggestion, checkpointed, smallest_cluster, suggestions
from ds_recipes.planner.peak import moments, worst
from ds_recipes.planner.situation import Situation, situation_of
from ds_recipes.planner.storage import Disk, Host, disk, host_memory
from ds_recipes.planner.work import Work, work_of


@dataclass(frozen=True)
class Question:
    """What the user asks for beside the run's settings."""

    nodes: int
    gpus_per_node: int
    memory_bytes: int
    peak_tflops: float
    mfu: float
    gpu: str = ""
    price_per_gpu_hour: float | None = None
    epoch_tokens: int | None = None


@dataclass(frozen=True)
class Answer:
    """The plan of one run."""

    found: Found
    question: Question
    situation: Situation
    plan: Plan
    moments: tuple[Moment, ...]
    boundaries: float  # bytes of activations with checkpointing while the head runs
    kept: float  # and without
    host: Host
    disk: Disk
    work: Work
    suggestions: tuple[Suggestion, ...]
    smallest: Cluster | None

    @property
    def worst(self) -> Moment:
        return worst(list(self.moments))

    @property
    def needed(self) -> float:
        return needed_bytes(self.worst.parts.total)

    @property
    def fits(self) -> bool:
        return self.needed <= self.question.memory_bytes

    def to_json(self) -> dict[str, Any]:
        """Numbers in bytes, seconds and elements, by the names that the terminal shows."""
        parts = self.worst.parts
        return {
            "model": {
                "from": self.found.where,
                "family": self.found.model.family,
                "parameters": self.found.model.numel,
                "tied": self.found.model.tied,
                "vocabulary_size": self.found.model.vocabulary_size,
                "notes": list(self.found.notes),
            },
            "cluster": {
                "nodes": self.question.nodes,
                "gpus_per_node": self.question.gpus_per_node,
                "gpu_memory_bytes": self.question.memory_bytes,
            },
            "fits": self.fits,
            "gpu_bytes": {
                **{name: round(value) for name, value in vars(parts).items()},
                "tensors": round(parts.total),
                "fragmentation": round(parts.total * FRAGMENTATION),
                "context": round(CONTEXT_BYTES),
                "needed": round(self.needed),
                "moment": self.worst.name,
            },
            "moments": {moment.name: round(moment.parts.total) for moment in self.moments},
            "activation_bytes": {"with_checkpointing": round(self.boundaries), "without": round(self.kept)},
            "host_bytes": {
                **{name: round(value) for name, value in vars(self.host).items()},
                "total": round(self.host.total),
            },
            "disk_bytes": {"checkpoint": self.disk.checkpoint, "kept": self.disk.kept, "total": self.disk.total},
            "run": {
                "rows_per_rank": self.plan.rows_per_rank,
                "micro_steps": self.plan.micro_steps,
                "global_rows": self.plan.global_rows,
                "tokens_per_step": self.work.tokens_per_step,
                "total_steps": self.work.total_steps,
                "total_tokens": self.work.total_tokens,
                "flops_per_token": self.work.flops_per_token,
                "mfu": self.question.mfu,
                "step_seconds": self.work.step_seconds,
                "tokens_per_second": self.work.tokens_per_second,
                "hours": self.work.hours,
                "node_hours": self.work.node_hours,
                "cost": self.work.cost,
            },
            "suggestions": [vars(one) for one in self.suggestions],
            "smallest_cluster": None if self.smallest is None else vars(self.smallest),
        }


def answer(config: Config, found: Found, question: Question) -> Answer:
    """Plan a run.

    Raises:
        ConfigError: batch sizes or groups do not divide by this number of ranks.
    """
    situation, plan = situation_of(config, question.nodes, question.gpus_per_node)
    if question.epoch_tokens is not None:
        rows = max(1, -(-question.epoch_tokens // plan.context_size))
        plan = make_plan(config, plan.world_size, rows)
    model = found.model
    all_moments = tuple(moments(model, situation))
    fits = needed_bytes(worst(list(all_moments)).parts.total) <= question.memory_bytes
    kept, boundaries = (Activations(model, other).at_head for other in _both(situation))
    return Answer(
        found=found,
        question=question,
        situation=situation,
        plan=plan,
        moments=all_moments,
        boundaries=boundaries,
        kept=kept,
        host=host_memory(model, situation, config),
        disk=disk(model, situation, config, plan),
        work=work_of(
            model, plan, question.gpus_per_node, question.peak_tflops, question.mfu, question.price_per_gpu_hour
        ),
        suggestions=() if fits else tuple(suggestions(model, situation, question.memory_bytes)),
        smallest=smallest_cluster(model, situation, question.gpus_per_node, question.memory_bytes),
    )


def _both(situation: Situation) -> tuple[Situation, Situation]:
    """The same run without and with activation checkpointing."""
    without = replace(situation, settings=replace(situation.settings, checkpointing=None))
    return without, situation if situation.settings.checkpointing else checkpointed(situation)
