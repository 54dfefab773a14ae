"""The optimizer of every engine: torch's own, so that no engine has another one's mathematics."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import nn

from ds_recipes.config.schema import OptimizerConfig


class Named(Protocol):
    """A model, or this rank's shards of one."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def make_optimizer(
    model: Named, shapes: Mapping[str, tuple[int, ...]], settings: OptimizerConfig
) -> torch.optim.Optimizer:
    """torch's fused AdamW, or SGD, with weight decay on matrices only (biases and norms have one dimension).

    The same class serves with and without CPU offload: it needs no compiler, and the mathematics stay the same.
    DeepSpeed's own DeepSpeedCPUAdam would have to be compiled at the first start.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if len(shapes[name]) >= 2]
    others = [parameter for name, parameter in trained if len(shapes[name]) < 2]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, settings.weight_decay), (others, 0.0))
        if parameters
    ]
    if settings.optimizer_type == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=settings.sgd_momentum)
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps, fused=True
    )
