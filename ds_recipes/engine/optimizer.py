"""The optimizer of every engine: torch's own, so that no engine has another one's mathematics."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ds_recipes.config.schema import OptimizerConfig
from ds_recipes.ranges import RangeReader

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The kinds of a checkpoint that hold an optimizer's state. SGD's momentum is kept as exp_avg."""


MOMENTUM_NAMES = (*MOMENTS, "momentum_buffer")
"""What torch's optimizers call the tensors of a parameter's state that are as large as the parameter."""


class Named(Protocol):
    """A model, or this rank's shards of one."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def make_optimizer(model: Named, decayed: Collection[str], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW, or SGD, with weight decay on the parameters that `decayed` names (`models/weight_decay.py`).

    The same class serves with and without CPU offload: it needs no compiler, and the mathematics stay the same.
    DeepSpeed's own DeepSpeedCPUAdam would have to be compiled at the first start. Parameters of another dtype than most
    (`models.skeleton.kept_in_float32`) have groups of their own, which come last.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    most = Counter(parameter.dtype for _, parameter in trained).most_common(1)[0][0]
    by_group: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trained:
        by_group.setdefault((parameter.dtype != most, name not in decayed), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": 0.0 if is_spared else settings.weight_decay}
        for (_, is_spared), parameters in sorted(by_group.items(), key=lambda group: group[0])
    ]
    if settings.optimizer_type == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=settings.sgd_momentum)
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps, fused=True
    )


def create_state(optimizer: torch.optim.Optimizer, master: torch.Tensor) -> None:
    """Make a parameter's state now: torch makes it at the first step, and a continued run is filled before that."""
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            **{kind: torch.zeros_like(master, requires_grad=False) for kind in MOMENTS},
        }
    elif optimizer.defaults["momentum"]:
        optimizer.state[master] = {"momentum_buffer": torch.zeros_like(master, requires_grad=False)}


def moment_of(state: Mapping[str, Any], kind: str) -> torch.Tensor | None:
    """The tensor that a checkpoint keeps as `kind`, out of a parameter's state; None without one."""
    is_momentum = kind == "exp_avg" and "momentum_buffer" in state
    moment: torch.Tensor | None = state.get("momentum_buffer" if is_momentum else kind)
    return moment


def moments_in(reader: RangeReader, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The kinds of this optimizer's state that a reader has; none where it holds another optimizer's."""
    is_adam = isinstance(optimizer, torch.optim.AdamW)
    if not reader.has("exp_avg") or reader.has("exp_avg_sq") != is_adam:
        return ()
    return MOMENTS if is_adam else MOMENTS[:1]


def moments_dtype(optimizer: torch.optim.Optimizer, master: torch.dtype) -> torch.dtype:
    """Of the state that is kept; the master weights' where there is none."""
    moments = (moment_of(state, "exp_avg") for state in optimizer.state.values())
    return next((moment.dtype for moment in moments if moment is not None), master)
