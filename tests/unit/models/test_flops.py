"""The formulas against torch's own counter and against brute force."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ds_recipes.models.flops import ModelFlops, attention_pairs, count_flops
from ds_recipes.models.skeleton import build_skeleton

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}


def skeleton_of(model_type: str, **changes: object) -> PreTrainedModel:
    config: PretrainedConfig = AutoConfig.for_model(model_type, **(SHAPE | changes))
    return build_skeleton(config, torch.float32, "eager", torch.device("cpu"), trust_remote_code=False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("llama", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 32}),  # heads x head size is twice the hidden size
        ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96}),
    ],
)
def test_a_training_step_costs_what_torch_counts(model_type: str, changes: dict[str, object], tied: bool) -> None:
    skeleton = skeleton_of(model_type, tie_word_embeddings=tied, **changes)
    flops = count_flops(skeleton)
    rows, context = 2, 96
    model = skeleton.to_empty(device="cpu")
    input_ids = torch.zeros(rows, context, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(rows * context * flops.per_token(context), rel=1e-3)


def test_a_mixture_counts_the_experts_a_token_visits() -> None:
    dense = count_flops(skeleton_of("mixtral", num_key_value_heads=4, num_local_experts=1, num_experts_per_tok=1))
    sparse = count_flops(skeleton_of("mixtral", num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2))
    layers, hidden, width = 3, 64, 96
    second_expert, router = 3 * hidden * width, 7 * hidden
    assert sparse.matmul_parameters - dense.matmul_parameters == layers * (second_expert + router)


def test_experts_in_modules_of_their_own_count_like_stacked_ones() -> None:
    class Expert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(8, 4) for _ in range(4)])

    model = skeleton_of("mixtral", num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=1)
    before = count_flops(model).matmul_parameters
    model.add_module("further", Expert())
    assert count_flops(model).matmul_parameters - before == 8 * 4


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 33])
def test_attention_pairs_are_the_ones_left_by_the_mask(length: int, window: int | None) -> None:
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]  # [length, length]
    seen = (distance >= 0) & (distance < (window or length + 1))
    assert attention_pairs(length, window) == int(seen.sum())


def test_documents_cost_less_than_a_row_and_a_single_one_about_half_of_its_attention() -> None:
    flops = ModelFlops(matmul_parameters=1000, attention_width=64, attention_windows=(None, None))
    context = 512
    whole, parts = flops.of_documents([context]), flops.of_documents([100, 412])
    attention = context * flops.per_token(context) - 6 * 1000 * context
    assert whole == pytest.approx(6 * 1000 * context + attention * (context + 1) / (2 * context))
    assert 6 * 1000 * context < parts < whole < context * flops.per_token(context)


def test_windows_follow_the_layer_types() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    flops = count_flops(
        skeleton_of("gemma3_text", head_dim=16, num_key_value_heads=2, layer_types=types, sliding_window=32)
    )
    assert flops.attention_windows == (32, None, 32)


def test_llama2_7b_by_hand() -> None:
    """6.607e9 matrix parameters: all 6.738e9 without the embedding; 12 x 32 x 4096 x 4096 for attention."""
    skeleton = skeleton_of(
        "llama",
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
    )
    flops = count_flops(skeleton)
    assert flops.matmul_parameters == 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert flops.per_token(4096) == 6 * flops.matmul_parameters + 12 * 32 * 4096 * 4096


def test_a_model_whose_config_counts_no_layers_counts_its_parameters_alone() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    parts = {f"{name}_config": {**small, "head_dim": 8} for name in ("encoder", "decoder", "patcher")}
    whole = {**small, "hidden_size": 64, "head_dim": 16}
    config = AutoConfig.for_model("blt", **parts, global_config=whole, encoder_hash_byte_group_vocab=64)
    assert not hasattr(config, "num_hidden_layers")
    flops = count_flops(build_skeleton(config, torch.float32, "eager", torch.device("cpu"), trust_remote_code=False))
    assert flops.per_token(8) == flops.per_token(64) > 0


def test_layers_that_differ_count_by_their_mean():
    from tools.tiny_models import tiny_config

    config = tiny_config("gemma4_text")
    widths = [layer.num_attention_heads * layer.head_dim for layer in config.per_layer_config]
    skeleton = build_skeleton(config, torch.float32, "eager", torch.device("cpu"), False)
    assert len(set(widths)) > 1
    assert count_flops(skeleton).attention_width == sum(widths) / len(widths)
