"""The chunked loss equals plain cross-entropy on full logits, value and every gradient, whatever the chunk."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from ds_recipes.models import loss_head
from ds_recipes.models.loss_head import LogitTransform, install_loss_head, learn_transform, token_loss_sum
from tests.unit.models.tiny import tiny_model


def plain_loss(hidden, weight, bias, target_ids, transform):
    scores = functional.linear(hidden, weight, bias) * transform.scale
    if transform.cap is not None:
        scores = transform.cap * torch.tanh(scores / transform.cap)
    return functional.cross_entropy(scores, target_ids, reduction="sum")


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.3), LogitTransform(scale=2.0, cap=3.0)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_rows, targets", [(64, 1), (64, 64), (64, 65), (64, 200), (1000, 200)])
def test_value_and_gradients_equal_plain_cross_entropy(monkeypatch, transform, with_bias, chunk_rows, targets):
    vocabulary, width = 53, 16
    monkeypatch.setitem(loss_head.CHUNK_ELEMENTS, "cpu", chunk_rows * vocabulary)
    torch.manual_seed(targets)
    inputs = [torch.randn(targets, width), torch.randn(vocabulary, width) / 8]  # unsaturated tanh: well conditioned
    inputs += [torch.randn(vocabulary)] if with_bias else []
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    theirs = [tensor.clone().double().requires_grad_() for tensor in inputs]
    target_ids = torch.randint(0, vocabulary, (targets,))
    our_loss = token_loss_sum(ours[0], ours[1], ours[2] if with_bias else None, target_ids, transform)
    their_loss = plain_loss(theirs[0], theirs[1], theirs[2] if with_bias else None, target_ids, transform)
    (our_loss * 0.37).backward()
    (their_loss * 0.37).backward()
    torch.testing.assert_close(our_loss.double(), their_loss, rtol=1e-6, atol=0)
    for mine, reference in zip(ours, theirs, strict=True):
        error = (mine.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert error < 1e-6


def test_no_targets_give_zero_loss_and_zero_gradients():
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = token_loss_sum(hidden, weight, None, torch.empty(0, dtype=torch.int64), LogitTransform())
    loss.backward()
    assert loss.item() == 0.0
    assert not weight.grad.any()


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
    token_loss_sum(hidden, weight, None, torch.arange(5), LogitTransform()).backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize(
    "transform",
    [
        LogitTransform(),
        LogitTransform(scale=0.3),
        LogitTransform(scale=2.0, cap=3.0),
        LogitTransform(cap=5.0),
        LogitTransform(columns=40),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_in_bfloat16_all_but_the_matrix_products_is_float32(monkeypatch, transform, with_bias):
    """The loss is that of the bfloat16 logits in float64; gradients lose no more than the products' own rounding."""
    vocabulary, width, targets = 53, 32, 300
    monkeypatch.setitem(loss_head.CHUNK_ELEMENTS, "cpu", 64 * vocabulary)
    torch.manual_seed(0)
    inputs = [torch.randn(targets, width), torch.randn(vocabulary, width) / 3, torch.randn(vocabulary)]
    low = [tensor.bfloat16().requires_grad_() for tensor in inputs[: 2 + with_bias]]
    high = [tensor.detach().double().requires_grad_() for tensor in low]
    target_ids = torch.randint(0, 40, (targets,))
    loss = token_loss_sum(low[0], low[1], low[2] if with_bias else None, target_ids, transform)
    loss.backward()
    logits = functional.linear(low[0], low[1], low[2] if with_bias else None).detach()
    exact = oracle_of_logits(logits.double(), target_ids, transform)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    scores = functional.linear(high[0], high[1], high[2] if with_bias else None)
    oracle_of_logits(scores, target_ids, transform).backward()
    for mine, reference in zip(low, high, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        assert (mine.grad.double() - reference.grad).norm() / reference.grad.norm() < 5e-3


def oracle_of_logits(logits, target_ids, transform):
    scores = logits * transform.scale
    if transform.cap is not None:
        scores = transform.cap * torch.tanh(scores / transform.cap)
    return functional.cross_entropy(scores[:, : transform.columns], target_ids, reduction="sum")


def test_gradients_of_very_many_chunks_are_summed_in_float32(monkeypatch):
    """In bfloat16 a sum stands still once what is added is less than its 256th part."""
    vocabulary, width, chunks = 5, 4, 600
    monkeypatch.setitem(loss_head.CHUNK_ELEMENTS, "cpu", 64 * vocabulary)
    torch.manual_seed(0)
    hidden = (1 + torch.randn(64 * chunks, width) / 8).bfloat16()
    low = [
        torch.randn(vocabulary, width).div(9).bfloat16().requires_grad_(),
        torch.zeros(vocabulary).bfloat16().requires_grad_(),
    ]
    high = [tensor.detach().double().requires_grad_() for tensor in low]
    target_ids = torch.zeros(len(hidden), dtype=torch.int64)
    token_loss_sum(hidden, *low, target_ids, LogitTransform()).backward()
    plain_loss(hidden.double(), *high, target_ids, LogitTransform()).backward()
    for mine, reference in zip(low, high, strict=True):
        assert (mine.grad.double() - reference.grad).norm() / reference.grad.norm() < 1e-2


@pytest.mark.parametrize(
    "family", ["llama", "llama_tied", "gemma2", "cohere", "granite", "gpt2", "phi", "qwen3", "mixtral", "gpt_neox"]
)
def test_a_models_loss_equals_that_of_its_own_logits(family):
    """Each family's own scale, cap or bias after the head is in the loss."""
    model = tiny_model(family)
    torch.manual_seed(1)
    input_ids = torch.randint(0, 90, (2, 12))
    position_ids = torch.arange(12).expand(2, 12)
    target_index, target_ids = torch.tensor([0, 3, 11, 12, 20]), torch.tensor([5, 89, 0, 7, 7])
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.flatten(0, 1)
    expected = functional.cross_entropy(logits[target_index].double(), target_ids, reduction="sum")
    names = [name for name, _ in model.named_parameters()]
    install_loss_head(model)
    learn_transform(model, lambda: model(input_ids, position_ids))
    loss = model(input_ids, position_ids, target_index, target_ids)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(input_ids, position_ids).flatten(0, 1), logits)


@pytest.mark.parametrize("model_type", ["roberta", "data2vec-text", "camembert", "xlm-roberta"])
def test_models_that_count_positions_from_their_padding_id_keep_to_that(model_type):
    """transformers' own forward without position ids is what an exported model computes."""
    torch.manual_seed(0)
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
    config = AutoConfig.for_model(
        model_type, **small, intermediate_size=48, is_decoder=True, max_position_embeddings=64
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    input_ids = torch.arange(3, 15)[None]
    expected = model(input_ids=input_ids).logits
    install_loss_head(model)
    torch.testing.assert_close(model(input_ids, torch.arange(12)[None]), expected)
