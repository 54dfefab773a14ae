"""What a built engine is asked before the first step: that the loss is the model's own, that no token sees what it is to
predict, and that packed documents are apart."""

import json
import math
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from ds_recipes.data.batch import MicroBatch, one_document, second_of_three
from ds_recipes.engine.base import Engine
from ds_recipes.errors import DsRecipesError, InputError
from ds_recipes.models.load import ModelSource
from ds_recipes.world.device_errors import device_error
from ds_recipes.world.group import World

CHECK_TOKENS = 8
CAUSALITY_TOKENS = 64
HEAD_TOLERANCE = {"fp32": (2e-5, 1e-6), "bf16": (2e-2, 2e-3), "fp16": (5e-3, 5e-4)}
"""What the loss of a target token may differ by from that of the model's own logits: as a share of the spread (standard
deviation) of these logits, and of the loss. The spread is what a change of the logits is to be measured by: a model of random
weights has small logits, and a soft cap of 30 changes their loss by 1e-5 only."""

EXPERTS_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3}
"""Nats a target token that a mixture of experts may differ by: its sums are in another order as other tokens come by. What
hides below that is seen by the gradient, which is exactly zero whatever the order."""

NOISE_FACTOR = 10
"""At full length a mixture of experts may differ by so many times what it differs by when a later document changes."""


def check_model(
    engine: Engine, source: ModelSource, world: World, precision: str, context_size: int, advice: str | None
) -> None:
    """All checks of this module. `advice` ends a refusal of documents that share a row; None where they never do. Collective.

    Raises:
        InputError: as the checks below; or the model's own code fails on a few tokens.
    """

    def checked(name: str, check: Callable[[], None]) -> None:
        world.check(name, lambda: _of_the_model(source, check), communicates=True)

    checked("loss head", lambda: check_loss_head(engine, source, precision))
    checked("causality", lambda: check_causality(engine, source, precision))
    if advice is not None:
        checked("isolation of documents", lambda: check_isolation(engine, source, precision, context_size, advice))


def _of_the_model(source: ModelSource, check: Callable[[], None]) -> None:
    """Run a check; what the model's code raises becomes an error for users. Errors of communication stay as they are."""
    try:
        check()
    except DsRecipesError:
        raise
    except Exception as error:
        if device_error(error) is not None:
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if any(part in frame.filename for part in ("torch/distributed/", "deepspeed/")):
            raise
        raise InputError(
            f"models of type {source.hf_config.model_type} cannot be trained with transformers {transformers.__version__}: a "
            f"forward of one row without a cache fails ({Path(frame.filename).name}:{frame.lineno}: {type(error).__name__}: "
            f"{(str(error) or 'no message').splitlines()[0]})"
        ) from error


def check_loss_head(engine: Engine, source: ModelSource, precision: str) -> None:
    """Compare the loss that training minimises with the loss of the model's own logits on a few tokens. Collective.

    Raises:
        InputError: the two differ, or the model changes its logits after the head in a way that is not supported.
    """
    input_ids = torch.arange(CHECK_TOKENS)[None] % source.vocabulary_size  # [1, tokens]
    batch = one_document(input_ids)
    ours, targets = engine.evaluate(batch)
    logits = engine.logits(input_ids)[0, :-1].double()  # [tokens - 1, vocabulary]
    theirs = float(torch.nn.functional.cross_entropy(logits, batch.target_ids.to(logits.device))) * targets
    of_spread, of_loss = HEAD_TOLERANCE[precision]
    tolerance = (of_spread * float(logits.std(-1).mean()) + of_loss * theirs / targets) * targets
    if math.isfinite(theirs) and not abs(float(ours) - theirs) <= tolerance:
        raise InputError(
            f"the loss of this model's own logits is {theirs / targets:.7f} a token where training would minimise "
            f"{float(ours) / targets:.7f}: it makes its logits in a way that is not supported"
        )


def check_causality(engine: Engine, source: ModelSource, precision: str) -> None:
    """See that what predicts a token does not depend on it or on a later one. Collective.

    With another last token the logits before it are the same, bit for bit; with experts, whose sums are in another order
    then, up to rounding. The derivative of the loss of earlier tokens by the last two inputs is zero.

    Raises:
        InputError: it depends on them.
    """
    vocabulary_size = source.vocabulary_size
    tokens = min(CAUSALITY_TOKENS, source.max_positions or CAUSALITY_TOKENS)
    input_ids = (torch.arange(tokens) * 7 + 1)[None] % vocabulary_size  # [1, tokens]
    other_ids = input_ids.clone()
    other_ids[0, -1] = (other_ids[0, -1] + vocabulary_size // 2) % vocabulary_size
    batch, other = (_without_last_targets(one_document(ids)) for ids in (input_ids, other_ids))
    targets = batch.num_target_tokens
    if source.has_experts:
        change = abs(float(engine.evaluate(batch)[0]) - float(engine.evaluate(other)[0])) / targets
        sees = change > EXPERTS_TOLERANCE[precision]
    else:
        before, after = (engine.logits(ids)[0, :-1] for ids in (input_ids, other_ids))  # [tokens - 1, vocabulary]
        change = float((before - after).abs().max())
        sees = change > 0.0
    gradient = engine.input_gradient(batch)[-2:]  # [2]
    if sees or gradient.nan_to_num().any():
        raise InputError(
            "tokens of this model see what they are to predict: its "
            + (f"logits change by {change:.2g} with a later token" if sees else "loss has a gradient by a later token")
            + f". {_why_not_causal(source)}"
        )


def _without_last_targets(batch: MicroBatch) -> MicroBatch:
    """Without the targets at the last two inputs: what is left predicts the tokens before the last."""
    return replace(batch, target_index=batch.target_index[:-1], target_ids=batch.target_ids[:-1])


def _why_not_causal(source: ModelSource) -> str:
    settings = source.hf_config.get_text_config()
    wrong = {
        "is_causal": False,
        "use_bidirectional_attention": True,
        "is_decoder": False,
        "attn_type": "bi",
        "causal": False,
    }
    for name, value in wrong.items():
        if getattr(settings, name, None) == value:
            return f"Its config.json has {name}: {json.dumps(value)}. Change that there if the weights are a causal model's."
    return (
        "It is not a causal language model, or its attention is not causal; such models cannot be trained to predict."
    )


def check_isolation(engine: Engine, source: ModelSource, precision: str, context_size: int, advice: str) -> None:
    """See that a packed document's loss does not depend on the document before it in its row. Collective.

    It may not change in a single bit, since shapes and kernels are the same, and its derivative by the inputs of the other
    document is zero. A model that ignores position ids (ALiBi, recurrent and convolution layers) would train on contaminated
    documents. `advice` ends the message of a refusal.

    Raises:
        InputError: it depends on it.
    """
    evaluated = [_second_loss(engine, source, number, CHECK_TOKENS, later=0) for number in (0, 1)]
    tolerance = EXPERTS_TOLERANCE[precision] if source.has_experts else 0.0
    sees = abs(evaluated[0] - evaluated[1]) > tolerance
    gradient = engine.input_gradient(_three_documents(source, 0, CHECK_TOKENS, later=0)).nan_to_num()
    if not sees and not gradient[:CHECK_TOKENS].any():
        length = min(context_size, source.max_positions or context_size) // 3
        evaluated = [_second_loss(engine, source, number, length, later=0) for number in (0, 1)]
        if source.has_experts:
            noise = abs(evaluated[0] - _second_loss(engine, source, 0, length, later=1))
            tolerance = max(tolerance, NOISE_FACTOR * noise)
        sees = abs(evaluated[0] - evaluated[1]) > tolerance
        gradient = gradient.zero_()
    if sees or gradient[:CHECK_TOKENS].any():
        found = (
            f"the loss of one is {evaluated[0]:.7f} or {evaluated[1]:.7f}, as another stands before it"
            if sees
            else "the loss of one has a gradient by the one before it"
        )
        raise InputError(
            f"documents that share a row see each other in this model: {found}. Its layers do not heed position_ids. {advice}"
        )


def _second_loss(engine: Engine, source: ModelSource, before: int, length: int, later: int) -> float:
    loss, targets = engine.evaluate(_three_documents(source, before, length, later))
    return float(loss) / targets


def _three_documents(source: ModelSource, before: int, length: int, later: int) -> MicroBatch:
    """A row of three documents of so many tokens each, with targets in the second; `before` and `later` number the others."""
    vocabulary_size, numbers = source.vocabulary_size, torch.arange(max(length, 2))
    first = (numbers * 7 + vocabulary_size // (3 - before)) % vocabulary_size  # [tokens]
    third = (numbers * 5 + vocabulary_size // (3 - later)) % vocabulary_size  # [tokens]
    return second_of_three(first, (numbers + 1) % vocabulary_size, third)
