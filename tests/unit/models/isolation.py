"""Which documents of a micro-batch change when one of them does."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from ds_recipes.data.batch import MicroBatch
from ds_recipes.engine.inputs import model_inputs

VOCABULARY = 97
BY_BORDERS = "by_borders"
"""An attention that takes rows and borders as FlashAttention does. transformers looks for a package at the word flash."""


def documents_of(rows: Sequence[Sequence[int]], seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(0, VOCABULARY, (length,), generator=generator) for length in row] for row in rows]


def packed(rows: Sequence[Sequence[torch.Tensor]]) -> MicroBatch:
    """Rows of documents as the stream makes them; what they are to predict does not matter here."""
    input_ids = torch.stack([torch.cat(list(row)) for row in rows])  # [rows, context]
    position_ids = torch.stack([torch.cat([torch.arange(len(document)) for document in row]) for row in rows])
    nothing = torch.empty(0, dtype=torch.int64)
    return MicroBatch(input_ids, position_ids, nothing, nothing, input_ids.numel(), sum(map(len, rows)), (0,))


@torch.inference_mode()
def logits_by_document(
    model: PreTrainedModel, rows: Sequence[Sequence[torch.Tensor]], **changed: Any
) -> list[torch.Tensor]:
    """Logits of each document, [tokens, vocabulary], of a forward with the arguments that an engine passes."""
    implementation = model.config._attn_implementation
    layout = "flash_attention_2" if implementation == BY_BORDERS else implementation
    arguments = model_inputs(packed(rows), model.device, layout)
    for name in ("target_index", "target_ids"):
        del arguments[name]
    logits = model(**(arguments | changed), use_cache=False).logits.flatten(0, 1)  # [rows * context, vocabulary]
    ends = accumulate((len(document) for row in rows for document in row), initial=0)
    return [logits[start:end] for start, end in pairwise(ends)]


def documents_that_change(
    model: PreTrainedModel, rows: Sequence[Sequence[torch.Tensor]], which: int, **changed: Any
) -> list[int]:
    """Numbers of the documents of which any logit differs in any bit when every token of document `which` is another."""
    others = [list(row) for row in rows]
    row, column = divmod(which, len(rows[0]))
    others[row][column] = (others[row][column] + 1 + torch.arange(len(others[row][column]))) % VOCABULARY
    before, after = (logits_by_document(model, documents, **changed) for documents in (rows, others))
    return [number for number, pair in enumerate(zip(before, after, strict=True)) if not torch.equal(*pair)]
