"""A model that uses a part of its parameters or does not, as its batch says, and what torch.optim makes of that."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ds_recipes.data.batch import MicroBatch
from ds_recipes.models.load import ModelSource
from tests.contract.oracle import Oracle, global_batch, llama

ROWS = 4
STEPS = 8
LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.5

FIRST_ROUTED = 5
"""The step, from 1, that expert 2 gets its first token in."""


def used_in(step: int, row: int) -> frozenset[str]:
    """What a row of a step uses besides what all use. Steps count from 1.

    Two rows are a micro-step of two ranks; what is outside the experts' block is used by both ranks of one, or by none.
    """
    used = {"expert 0"}
    if row == 0 and step % 2:  # by one rank alone, in every other step
        used.add("expert 1")
    if step in (FIRST_ROUTED, FIRST_ROUTED + 1, FIRST_ROUTED + 3) and row >= 2:  # in the second micro-step alone
        used.add("expert 2")
    if step in (2, 6) or (step == 4 and row >= 2):
        used.add("side")
    return frozenset(used)


NAMES_USED = {"expert 0": ".experts.0.", "expert 1": ".experts.1.", "expert 2": ".experts.2.", "side": ".side."}


class Switch:
    """What the next forward uses."""

    on: frozenset[str] = frozenset()


class SwitchedExperts(nn.Module):
    """The sum of the experts that are on."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden_size, 33, dtype=dtype), nn.Tanh(), nn.Linear(33, hidden_size, dtype=dtype))
            for _ in range(3)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        chosen = [expert(hidden) for number, expert in enumerate(self.experts) if f"expert {number}" in Switch.on]
        return torch.stack(chosen).sum(dim=0)


class Ending(nn.Module):
    """The last norm, a linear layer beside it that is on or off, and a tower that is never used."""

    def __init__(self, norm: nn.Module, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm
        self.side = nn.Linear(hidden_size, hidden_size, dtype=dtype)
        self.tower = nn.Linear(hidden_size, hidden_size, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(hidden)
        return normed + self.side(hidden) if "side" in Switch.on else normed


def with_switches(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Put these modules into a Llama model."""
    with torch.device(device):
        for layer in model.model.layers:
            layer.mlp = SwitchedExperts(model.config.hidden_size, model.dtype)
        model.model.norm = Ending(model.model.norm, model.config.hidden_size, model.dtype)
    return model


@dataclass(frozen=True)
class SwitchedSource(ModelSource):
    """A source of such a model."""

    def skeleton(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return with_switches(super().skeleton(*args, **kwargs), "meta")


def source() -> SwitchedSource:
    return SwitchedSource(llama(tied=False), None, 7, False)


class SwitchedOracle(Oracle):
    """The oracle with such a model, and torch's AdamW over it."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(llama(tied=False), weights, "adamw")
        with_switches(self.model, "cpu")
        self.model.load_state_dict(weights)
        named = dict(self.model.named_parameters())
        spared = [name for name in named if name.endswith("bias") or "norm" in name.split(".")[-2]]
        groups = [
            {"params": [named[name] for name in named if name not in spared], "weight_decay": WEIGHT_DECAY},
            {"params": [named[name] for name in spared], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, foreach=False)

    def take(self, step: int) -> float:
        """One step of the whole global batch; returns the gradient's norm before clipping."""
        rows = global_batch(step, ROWS)
        targets = sum(row.num_target_tokens for row in rows)
        self.optimizer.zero_grad(set_to_none=True)
        for number, row in enumerate(rows):
            Switch.on = used_in(step, number)
            if row.num_target_tokens:
                (self.loss_sum(row) / targets).backward()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), CLIP))
        self.optimizer.step()
        return norm

    def steps_of(self, name: str) -> int:
        """How many steps a parameter has taken."""
        state = self.optimizer.state.get(dict(self.model.named_parameters())[name], {})
        return int(state.get("step", 0))


def rows_of_rank(step: int, rank: int, ranks: int) -> Sequence[tuple[int, MicroBatch]]:
    """This rank's micro-batches of a step, of one row each, with the row's number."""
    rows = global_batch(step, ROWS)
    return [(number, rows[number]) for number in range(rank, ROWS, ranks)]
