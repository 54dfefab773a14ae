"""How packed rows are laid out for a model's forward.

Documents in a row are kept apart by position ids that restart, without any mask. transformers' sdpa and eager read
them for any number of rows; FlashAttention 2 only for a batch of one row, so there the rows lie end to end, with the
document borders computed once instead of in every layer.
"""

from typing import Any

import torch

from ds_recipes.data.batch import MicroBatch

PROBE_IDS = torch.zeros((1, 8), dtype=torch.int64)  # [rows, context], for a forward whose hidden states do not matter


def model_inputs(batch: MicroBatch, device: torch.device, implementation: str) -> dict[str, Any]:
    """The arguments of the model's forward for one micro-batch, on `device`.

    `input_ids` and `position_ids` are [rows, context], or [1, rows * context] where the rows lie end to end.
    """
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "target_index": batch.target_index,
        "target_ids": batch.target_ids,
    }
    if implementation.startswith("flash_attention"):
        inputs |= end_to_end(batch)
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def end_to_end(batch: MicroBatch) -> dict[str, Any]:
    """Rows as one row of [1, rows * context], with the documents' borders as FlashAttention takes them.

    A document starts wherever its position id is 0, at each row's start too. `cu_seq_lens` is int32, [documents + 1].
    """
    position_ids = batch.position_ids.reshape(1, -1)  # [1, rows * context]
    starts = torch.nonzero(position_ids[0] == 0).flatten()
    borders = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).to(torch.int32)  # [documents + 1]
    longest = int(borders.diff().max())
    return {
        "input_ids": batch.input_ids.reshape(1, -1),
        "position_ids": position_ids,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }
