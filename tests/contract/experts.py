"""A model as a hub's own code has them: each block chooses one expert of a list of modules for each token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from ds_recipes.models.load import ModelSource
from tests.contract.oracle import Oracle

EXPERTS = 8
WIDTH = 33


class ChosenExperts(nn.Module):
    """The router's best expert for each token; an expert without tokens does not run."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, EXPERTS, bias=False, dtype=dtype)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(hidden_size, WIDTH, bias=False, dtype=dtype),
                nn.SiLU(),
                nn.Linear(WIDTH, hidden_size, bias=False, dtype=dtype),
            )
            for _ in range(EXPERTS)
        )
        self.used: list[set[int]] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, -2)  # [tokens, hidden]
        share, chosen = self.gate(flat).softmax(-1).max(-1)  # [tokens]
        out = torch.zeros_like(flat)
        self.used.append(set(chosen.tolist()))
        for number in sorted(self.used[-1]):
            where = (chosen == number).nonzero().flatten()
            out = out.index_add(0, where, self.experts[number](flat[where]) * share[where, None])
        return out.view_as(hidden)


def with_experts(model: PreTrainedModel, device: torch.device | str, only_experts_train: bool) -> PreTrainedModel:
    """Put such a block into each layer of a Llama model."""
    for layer in model.model.layers:
        with torch.device(device):
            layer.mlp = ChosenExperts(model.config.hidden_size, model.dtype)
    if only_experts_train:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp.experts." in name)
    return model


@dataclass(frozen=True)
class ExpertsSource(ModelSource):
    """A source of such a model."""

    only_experts_train: bool = False

    def skeleton(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return with_experts(super().skeleton(*args, **kwargs), "meta", self.only_experts_train)


class ExpertsOracle(Oracle):
    """The oracle with such a model."""

    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(config, weights, "sgd", weight_decay=0.0)
        with_experts(self.model, "cpu", only_experts_train=False)
        self.model.load_state_dict(weights)
