"""The reference for every engine: one process, plain PyTorch, full logits, the whole global batch at once."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_recipes.data.batch import MicroBatch

VOCABULARY = 331
CONTEXT = 32


def llama(tied: bool) -> LlamaConfig:
    """Odd sizes, so that no parameter divides evenly over 2, 3 or 4 ranks."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=60,
        intermediate_size=97,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
    )


def global_batch(step: int, rows: int, context: int = CONTEXT) -> list[MicroBatch]:
    """`rows` packed rows of two documents each; every fourth row has no target, the others an uneven number."""
    batch = []
    for row in range(rows):
        generator = torch.Generator().manual_seed(1000 * step + row)
        input_ids = torch.randint(0, VOCABULARY, (1, context), generator=generator)
        border = int(torch.randint(4, context - 4, (1,), generator=generator))
        position_ids = torch.cat([torch.arange(border), torch.arange(context - border)])[None]
        candidates = torch.tensor([index for index in range(context - 1) if index != border - 1])
        count = 0 if row % 4 == 3 else int(torch.randint(1, len(candidates), (1,), generator=generator))
        target_index = candidates[torch.randperm(len(candidates), generator=generator)[:count]].sort().values
        batch.append(
            MicroBatch(input_ids, position_ids, target_index, input_ids[0, target_index + 1], context, 2, (row,))
        )
    return batch


def skewed_batch(step: int, rows: int) -> list[MicroBatch]:
    """As `global_batch`, but some tokens are common and others rare: there is something to learn.

    No batch comes twice. A model that learns a few by heart enlarges every rounding error (DESIGN section 4): with eight
    batches at a learning rate of 1e-3 the oracle is 4e-3 from itself where documents share a row, with these 9e-7.
    """
    chances = 1 / torch.arange(1, VOCABULARY + 1)
    batch = []
    for row in global_batch(step, rows):
        generator = torch.Generator().manual_seed(77 * step + row.row_ids[0])
        input_ids = torch.multinomial(chances, CONTEXT, replacement=True, generator=generator)[None]  # [1, context]
        batch.append(replace(row, input_ids=input_ids, target_ids=input_ids[0, row.target_index + 1]))
    return batch


def joined(rows: list[MicroBatch]) -> MicroBatch:
    """Several one-row micro-batches as one micro-batch."""
    context = rows[0].input_ids.shape[1]
    return MicroBatch(
        input_ids=torch.cat([row.input_ids for row in rows]),
        position_ids=torch.cat([row.position_ids for row in rows]),
        target_index=torch.cat([row.target_index + index * context for index, row in enumerate(rows)]),
        target_ids=torch.cat([row.target_ids for row in rows]),
        num_tokens=sum(row.num_tokens for row in rows),
        num_samples=sum(row.num_samples for row in rows),
        row_ids=tuple(number for row in rows for number in row.row_ids),
    )


class Oracle:
    """A plain model with a plain optimizer. `step` returns (loss a target token, gradient norm before clipping)."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: dict[str, torch.Tensor],
        optimizer: str,
        weight_decay: float = 0.1,
        clip: float = 0.0,
        frozen: str | None = None,
    ) -> None:
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        self.model.load_state_dict(weights, strict=False)
        self.model.tie_weights()
        self._clip = clip
        freeze(self.model, frozen)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._trained = parameters
        groups = [
            {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
            {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = (
            torch.optim.SGD(groups, lr=0.0)
            if optimizer == "sgd"
            else torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, foreach=False)
        )

    def loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        """Sum of token losses from the model's own full logits, each document in a forward pass of its own."""
        total = torch.zeros(())
        for ids, targets in documents(batch):
            logits = self.model(input_ids=ids[None], use_cache=False).logits[0]  # [tokens, vocabulary]
            wanted = targets >= 0
            total = total + functional.cross_entropy(logits[wanted], targets[wanted], reduction="sum")
        return total

    def gradients(self, rows: list[MicroBatch]) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss a target token of a global batch, and its gradient by parameter name."""
        self._optimizer.zero_grad()
        target_tokens = sum(row.num_target_tokens for row in rows)
        loss = 0.0
        for row in rows:
            if row.num_target_tokens:
                part = self.loss_sum(row) / target_tokens
                part.backward()
                loss += part.item()
        return loss, {
            name: parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def step(
        self, rows: list[MicroBatch], lr: float, perturbed: tuple[float, torch.Generator] | None = None
    ) -> tuple[float, float]:
        """One optimizer step; returns the loss a target token and the gradient's norm before clipping.

        `perturbed` is the size of a normal error on each element of the gradient that is not zero, relative to the root
        mean square of its parameter's, and where to draw it from. Sums in another order err like that.
        """
        loss, gradients = self.gradients(rows)
        if perturbed is not None:
            size, generator = perturbed
            for parameter in self._trained:
                has = parameter.grad != 0
                error = size * parameter.grad.norm() / has.sum().sqrt()
                parameter.grad.add_(has * torch.randn(parameter.shape, generator=generator), alpha=float(error))
        norm = norm_of(gradients)
        if self._clip and norm > self._clip:
            for parameter in self._trained:
                parameter.grad.mul_(self._clip / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return loss, norm

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    """The global L2 norm, summed in float64 (float32 sums are off by 5e-6 at this size)."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).double().norm().item()


def freeze(model: nn.Module, pattern: str | None) -> None:
    """Take the parameters whose name holds the pattern out of training."""
    for name, parameter in model.named_parameters():
        if pattern is not None and re.search(pattern, name):
            parameter.requires_grad_(False)


def documents(batch: MicroBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each document's ids and its targets by position (-1: none), cut out of the packed rows."""
    targets = torch.full((batch.input_ids.numel(),), -1)
    targets[batch.target_index] = batch.target_ids
    starts = torch.nonzero(batch.position_ids.flatten() == 0).flatten().tolist()
    for start, end in pairwise([*starts, batch.input_ids.numel()]):
        if (targets[start:end] >= 0).any():
            yield batch.input_ids.flatten()[start:end], targets[start:end]
