"""Mixtures of experts at stages 1 and 2: an expert without tokens on a rank still takes part in the sum over ranks.

DeepSpeed 0.19 puts gradients into its buckets as they come, each rank those of the experts that it used, and sums bucket
by bucket: gloo aborts over sizes that differ, and where they happen to be equal, gradients of different experts are added
without a word (tests/contract/test_zero_experts.py). So all ranks must have the same gradients in the same order.
"""

from typing import Any

import torch
from torch import nn

from ds_recipes.engine.zero3.leaf import expert_blocks


def give_every_expert_a_gradient(model: nn.Module) -> frozenset[str]:
    """Let each block that chooses among a list of experts add a gradient of zeros to all of its parameters; their names."""
    blocks = expert_blocks(model)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    for block in blocks:
        block.register_forward_pre_hook(_add_zeros, with_kwargs=True)
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in inside)


def _add_zeros(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tie the parameters to the block's input, whose gradient is the last that the block's backward makes.

    So no parameter's gradient is complete before, and then all are, in the order of the block's parameters. Tied to the
    output, those of unused experts would come first, on each rank others.
    """
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    if not parameters or not torch.is_grad_enabled():
        return None
    if args:
        return (_WithZeroGradients.apply(args[0], *parameters), *args[1:]), kwargs  # type: ignore[no-untyped-call]
    name = next(iter(kwargs))
    return args, {**kwargs, name: _WithZeroGradients.apply(kwargs[name], *parameters)}  # type: ignore[no-untyped-call]


def is_filled_in(gradient: torch.Tensor) -> bool:
    """True for a whole gradient that is this module's zeros: autograd had none to add to them."""
    zero = _ZEROS.get((gradient.dtype, gradient.device))
    return zero is not None and gradient.data_ptr() == zero.data_ptr()


_ZEROS: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
"""One number for each dtype and device, which all of this module's gradients are views of."""


def _zero_like(parameter: torch.Tensor) -> torch.Tensor:
    key = parameter.dtype, parameter.device
    if key not in _ZEROS:
        _ZEROS[key] = parameter.new_zeros(())
    return _ZEROS[key]


class _WithZeroGradients(torch.autograd.Function):
    """The tensor as it is; in backward zeros, which take no memory, for the parameters besides."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.parameters = parameters
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (grad, *(_zero_like(parameter).expand_as(parameter) for parameter in ctx.parameters))
