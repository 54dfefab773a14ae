"""What a tracker is, and the names that it is given."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

METRIC_NAMES = (
    "step",
    "loss",  # nats a target token, mean over the whole step
    "perplexity",
    "lr",
    "grad_norm",  # before clipping
    "loss_scale",  # of the step, in fp16 only
    "skipped_steps",  # cumulative: loss or gradient not finite
    "loss_spikes",  # cumulative
    "rewinds",  # cumulative: times that the run went back after a divergence
    "tokens",  # cumulative, all ranks, without padding
    "target_tokens",  # cumulative, all ranks
    "samples",  # documents, cumulative, all ranks
    "tokens_per_sec",  # all ranks, without padding
    "tokens_per_sec_per_rank",
    "mfu",
    "step_seconds",
    "data_seconds",
    "memory_gib",
    "blocks_forward_seconds",  # these three with the JSON's activation_checkpointing.profile only, of rank 0
    "blocks_recompute_seconds",
    "checkpoints_gib",
    "epoch",
    "data_hash",  # rolling hash of the rows taken so far and of the data they are of
)
"""The fields of a line of metrics.jsonl. Whatever else a step logs is of one source, or a norm of the optimizer's state."""

SOURCE_METRICS = ("epoch/", "tokens/")
"""Of a run on several sources: passes over each, and its tokens so far without padding, behind the source's name."""

PANELS = {
    "loss": "training/loss",
    "perplexity": "training/perplexity",
    "tokens": "training/tokens",
    "target_tokens": "training/target_tokens",
    "samples": "training/samples",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "loss_scale": "optimizer/loss_scale",
    "skipped_steps": "optimizer/skipped_steps",
    "loss_spikes": "training/loss_spikes",
    "rewinds": "training/rewinds",
    "tokens_per_sec": "stats/tokens_per_sec",
    "tokens_per_sec_per_rank": "stats/tokens_per_sec_per_gpu",
    "mfu": "stats/mfu",
    "step_seconds": "stats/1_iteration_time",
    "data_seconds": "stats/data_time",
    "memory_gib": "stats/memory_gib",
    "blocks_forward_seconds": "stats/blocks_forward_time",
    "blocks_recompute_seconds": "stats/blocks_recompute_time",
    "checkpoints_gib": "stats/checkpoints_gib",
    "step": "utils/step",
    "epoch": "utils/epoch",
    "eval_loss": "evaluation/val_loss",
    "eval_perplexity": "evaluation/val_ppl",
}
"""Names on wandb and TensorBoard: those of kotoba-recipes, so that old and new runs share their panels."""


def panel_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among `metrics` by their panel's name; norms of the optimizer's state go to its group."""
    return {
        PANELS.get(name, f"{_group(name)}/{name}"): value
        for name, value in metrics.items()
        if isinstance(value, int | float)
    }


def _group(name: str) -> str:
    if name.startswith(SOURCE_METRICS):
        return "data"
    return "evaluation" if name.startswith("eval_") else "optimizer"


class Tracker(ABC):
    """Somewhere that a run's metrics go to. Lives on rank 0."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take a training step's metrics (`METRIC_NAMES`) and, where they were computed, the state's norms."""

    @abstractmethod
    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the results of an evaluation after `step`: names that start with eval_."""

    @abstractmethod
    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Take something that happened: a save, a signal, a skipped step, a fault."""

    @abstractmethod
    def rewind(self, step: int, total_steps: int) -> None:
        """The run goes on from `step`: what was logged of later steps no longer holds."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left. Nothing is logged afterwards."""
