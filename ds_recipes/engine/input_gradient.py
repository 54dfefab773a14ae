"""What a loss depends on: its derivative by the model's input embeddings, taken without any parameter's gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ds_recipes.engine.activations import ActivationRecord
from ds_recipes.errors import InputError


def loss_and_input_gradients(
    model: PreTrainedModel, loss_of: Callable[[], torch.Tensor], activations: ActivationRecord | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What `loss_of()` is, and its derivatives by what the model's embedding gives, [..., hidden] each, in its dtype.

    `loss_of` runs the model once. Activations are kept for it, not computed again.

    Raises:
        InputError: the model does not embed its input in a way that can be followed.
    """
    was_training = model.training
    model.eval()
    try:
        with _cut_at_embedding(model) as leaves, _kept(activations), torch.enable_grad():
            loss = loss_of()
            if not leaves:
                raise InputError(f"{type(model).__name__} does not use its input embeddings; not supported")
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    finally:
        model.train(was_training)
    return loss.detach(), [
        torch.zeros_like(leaf) if gradient is None else gradient.detach()
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


@contextmanager
def _cut_at_embedding(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Let the graph begin at what the embedding gives; yields those tensors as the forward makes them."""
    leaves: list[torch.Tensor] = []

    def cut(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # some models write into it

    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


@contextmanager
def _kept(activations: ActivationRecord | None) -> Iterator[None]:
    if activations is None:
        yield
        return
    with activations.paused():
        yield
