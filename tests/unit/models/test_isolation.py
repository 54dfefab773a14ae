"""Packed documents do not see each other: changing one leaves every logit of the others as it was, bit for bit."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.unit.models.isolation import (
    BY_BORDERS,
    VOCABULARY,
    documents_of,
    documents_that_change,
    logits_by_document,
    packed,
)
from tests.unit.models.tiny import CONFIGS, tiny_model

IMPLEMENTATIONS = ("sdpa", "eager")
ROWS = ((9, 14, 1), (5, 5, 14))
"""Lengths of the documents of a micro-batch's rows; one of them is a single token."""

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS: dict[str, PretrainedConfig] = {
    "mistral, window of 4": AutoConfig.for_model("mistral", **SMALL, sliding_window=4),
    "gemma3, window of 4 in one layer": AutoConfig.for_model(
        "gemma3_text", **SMALL, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
}
DENSE = [*(family for family in CONFIGS if family != "mixtral"), *WINDOWS]
CASES = [
    (family, implementation)
    for family in DENSE
    for implementation in IMPLEMENTATIONS
    if (family, implementation) != ("gemma2", "sdpa")  # transformers has none
]


def model_of(family: str, implementation: str) -> PreTrainedModel:
    """A model with a config of its own: setting its attention writes into that."""
    if family in CONFIGS:
        model = copy.deepcopy(tiny_model(family))
    else:
        torch.manual_seed(0)
        config = copy.deepcopy(WINDOWS[family])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model


@pytest.mark.parametrize("family, implementation", CASES)
def test_a_changed_document_changes_itself_alone(family: str, implementation: str) -> None:
    model, rows = model_of(family, implementation), documents_of(ROWS)
    for which in range(6):
        assert documents_that_change(model, rows, which) == [which]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 12), min_size=3, max_size=3), st.integers(0, 2), st.integers(0, 99))
def test_any_lengths_are_kept_apart(lengths: list[int], which: int, seed: int) -> None:
    rows = documents_of([lengths], seed)
    for implementation in IMPLEMENTATIONS:
        assert documents_that_change(model_of("llama", implementation), rows, which) == [which]


@pytest.mark.parametrize("family, implementation", CASES)
def test_a_packed_document_computes_what_it_does_alone(family: str, implementation: str) -> None:
    model, rows = model_of(family, implementation), documents_of(ROWS)
    together = logits_by_document(model, rows)
    for document, logits in zip((document for row in rows for document in row), together, strict=True):
        (alone,) = logits_by_document(model, [[document]])
        torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mistake", ["mask of ones", "positions that run on"])
def test_the_check_finds_documents_that_see_each_other(implementation: str, mistake: str) -> None:
    """A mask switches the separation off without a word, and so do positions that do not restart."""
    model, rows = model_of("llama", implementation), documents_of(ROWS)
    shape = packed(rows).input_ids.shape
    changed = (
        {"attention_mask": torch.ones(shape, dtype=torch.int64)}
        if mistake == "mask of ones"
        else {"position_ids": torch.arange(shape[1]).expand(shape)}
    )
    assert documents_that_change(model, rows, 0, **changed) == [0, 1, 2]
    assert documents_that_change(model, rows, 4, **changed) == [4, 5]


def attention_by_borders(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, tokens, head size]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """FlashAttention's contract in plain torch: one row, causal within the borders that the caller gives."""
    assert attention_mask is None and cu_seq_lens_q is not None and query.shape[0] == 1
    parts = [
        functional.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            None,
            0.0,
            True,
            scale=scaling,
            enable_gqa=True,
        )
        for start, end in pairwise(cu_seq_lens_q.tolist())
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None  # [1, tokens, heads, head size]


AttentionInterface.register(BY_BORDERS, attention_by_borders)


@pytest.mark.parametrize("family", ["llama", "qwen3", "cohere", "granite", "phi", "gpt_neox", "gpt2"])
def test_the_borders_given_to_flash_attention_keep_documents_apart(family: str) -> None:
    """The rows' layout and the borders reach the kernel through every family, and are the right ones."""
    model, rows = model_of(family, BY_BORDERS), documents_of(ROWS)
    for which in range(6):
        assert documents_that_change(model, rows, which) == [which]
    ours, theirs = logits_by_document(model, rows), logits_by_document(model_of(family, "sdpa"), rows)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
    one_document = torch.tensor([0, packed(rows).input_ids.numel()], dtype=torch.int32)
    assert documents_that_change(model, rows, 1, cu_seq_lens_q=one_document) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_see_one_document_too(implementation: str) -> None:
    """A mixture's experts take the tokens of all documents in one product, whose sums round by how many there are."""
    model, rows = model_of("mixtral", implementation), documents_of(ROWS)
    changed = [list(row) for row in rows]
    changed[0][1] = (changed[0][1] + 1) % VOCABULARY
    before, after = logits_by_document(model, rows), logits_by_document(model, changed)
    for number, (mine, theirs) in enumerate(zip(before, after, strict=True)):
        difference = (mine - theirs).abs().max().item()
        assert difference > 1e-2 if number == 1 else difference < 1e-6, (number, difference)
