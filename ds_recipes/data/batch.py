"""The rows that one rank trains on in one micro-step."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MicroBatch:
    """Packed rows and their targets. All tensors are int64.

    `position_ids` restart at each document, which is what keeps packed documents from seeing each other. The targets
    are already shifted: the hidden state at flat position `target_index[i]` must predict `target_ids[i]`. Padding has
    position ids of its own and no targets.
    """

    input_ids: torch.Tensor  # [rows, context]
    position_ids: torch.Tensor  # [rows, context]
    target_index: torch.Tensor  # [targets], into the flattened [rows * context]
    target_ids: torch.Tensor  # [targets]
    num_tokens: int  # not padding
    num_samples: int  # documents
    row_ids: tuple[int, ...]  # positions in the run's order, for error messages
    source_tokens: tuple[int, ...] = ()  # not padding, by source of the data

    @property
    def num_target_tokens(self) -> int:
        return self.target_ids.numel()


def one_document(input_ids: torch.Tensor) -> MicroBatch:
    """One row that is one document, [1, tokens]: each token predicts the next."""
    tokens = input_ids.shape[1]
    positions = torch.arange(tokens)
    return MicroBatch(input_ids, positions[None], positions[:-1], input_ids[0, 1:], tokens, 1, (0,))


def second_of_three(first: torch.Tensor, second: torch.Tensor, third: torch.Tensor) -> MicroBatch:
    """One row of three documents, [tokens] each: only the second has targets."""
    before, tokens = first.numel(), second.numel()
    row = torch.cat([first, second, third])  # [row]
    positions = torch.cat([torch.arange(document.numel()) for document in (first, second, third)])  # [row]
    targets = before + torch.arange(tokens - 1)  # [targets]
    return MicroBatch(row[None], positions[None], targets, second[1:], row.numel(), 3, (0,))
