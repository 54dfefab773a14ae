"""What a built engine is asked before the first step: that the loss is the model's own, and that packed documents are apart."""

import torch

from ds_recipes.data.batch import one_document, second_of_two
from ds_recipes.engine.base import Engine
from ds_recipes.errors import InputError
from ds_recipes.models.load import ModelSource

CHECK_TOKENS = 8
HEAD_CHECK_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}
EXPERTS_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3}
"""Nats a target token that a mixture of experts may differ by: its sums are in another order as other tokens come by."""


def check_loss_head(engine: Engine, vocabulary_size: int, precision: str) -> None:
    """Compare the loss that training minimises with the loss of the model's own logits on a few tokens.

    A model that changes its logits after the head in a way we do not know would train on a wrong loss without a word.
    Every rank must call it, and gets the same verdict.

    Raises:
        InputError: the two differ.
    """
    input_ids = torch.arange(CHECK_TOKENS)[None] % vocabulary_size  # [1, tokens]
    batch = one_document(input_ids)
    ours, targets = engine.evaluate(batch)
    logits = engine.logits(input_ids)[0, :-1]  # [tokens - 1, vocabulary]
    theirs = torch.nn.functional.cross_entropy(logits, batch.target_ids.to(logits.device), reduction="sum")
    if abs(float(ours) - float(theirs)) > HEAD_CHECK_TOLERANCE[precision] * targets:
        raise InputError(
            f"this model changes its logits after the head in a way that is not supported: its own forward gives a loss "
            f"of {float(theirs) / targets:.5f} a token where training would minimise {float(ours) / targets:.5f}"
        )


def check_isolation(engine: Engine, source: ModelSource, precision: str, advice: str) -> None:
    """See that a packed document's loss does not change with the document before it in its row.

    It may not change in a single bit, since shapes and kernels are the same. A model that ignores position ids (ALiBi,
    recurrent and convolution layers) would train on contaminated documents without a word. Every rank must call it, and
    gets the same verdict. `advice` ends the message of a refusal.

    Raises:
        InputError: the loss changes.
    """
    vocabulary_size = source.vocabulary_size
    second = torch.arange(1, CHECK_TOKENS + 1) % vocabulary_size  # [tokens]
    losses = []
    for offset in (vocabulary_size // 3, vocabulary_size // 2):
        first = (torch.arange(CHECK_TOKENS) * 7 + offset) % vocabulary_size  # [tokens]
        loss, targets = engine.evaluate(second_of_two(first, second))
        losses.append(float(loss) / targets)
    if abs(losses[0] - losses[1]) > (EXPERTS_TOLERANCE[precision] if source.has_experts else 0.0):
        raise InputError(
            "documents that share a row see each other in this model: the loss of one is "
            f"{losses[0]:.7f} or {losses[1]:.7f}, as another stands before it. Its layers do not heed position_ids. "
            f"{advice}"
        )
