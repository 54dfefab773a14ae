"""Mixtures of experts under ZeRO-3: an expert that no token of a rank goes to neither hangs nor changes the gradient."""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DbrxConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Config, DeepseekV32Indexer
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextConfig, Qwen4ExpTextQSAIndexer

from ds_recipes.config.plan import make_plan
from ds_recipes.engine.create import create_engine
from ds_recipes.engine.zero3.leaf import expert_blocks, leaf_class_names, mark_expert_blocks
from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World
from tests.contract.engines import ROWS, Case, settings, train_steps
from tests.contract.experts import ChosenExperts, ExpertsOracle, ExpertsSource
from tests.contract.oracle import CONTEXT, VOCABULARY, Oracle, global_batch, llama
from tests.ranks.launch import run_ranks

MIXTRAL = MixtralConfig(
    vocab_size=VOCABULARY,
    hidden_size=60,
    intermediate_size=36,  # its kernel takes rows of a multiple of 16 bytes
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=5,
    num_local_experts=8,
    num_experts_per_tok=1,
    max_position_embeddings=CONTEXT,
)
DBRX = DbrxConfig(
    vocab_size=VOCABULARY,
    d_model=60,
    n_heads=5,
    n_layers=2,
    max_seq_len=CONTEXT,
    attn_config={"kv_n_heads": 5, "clip_qkv": 8, "rope_theta": 1e4},
    ffn_config={"hidden_size": 60, "ffn_hidden_size": 36, "moe_num_experts": 8, "moe_top_k": 1},
)
ROUNDING = 1e-6  # of a norm's weights, which are about 1, seen in their difference
SHARD_EVERYTHING = '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
PLAIN = Case(ds=SHARD_EVERYTHING, lrs=(1.0,))  # a small rate would drown the gradient in the rounding of the weights
CASES = {
    "a list of experts": (ExpertsSource(llama(False), None, 7, False), PLAIN),
    "a list of experts, checkpointed": (
        ExpertsSource(llama(False), None, 7, False),
        replace(PLAIN, checkpointing=True),
    ),
    "only experts train": (ExpertsSource(llama(False), None, 7, False, only_experts_train=True), PLAIN),
    "mixtral": (ModelSource(MIXTRAL, None, 7, False), PLAIN),
    "a loop over experts in one tensor": (ModelSource(DBRX, None, 7, False), PLAIN),
}


def trained(world: World, cases: list[tuple[ModelSource, Case]], tmp: str) -> list[dict[str, Any]]:
    """Of each case: the weights before and after two steps, what was reported, and the experts used in each forward."""
    reports = []
    for source, case in cases:
        config = settings(case, Path(tmp))
        engine = create_engine(config, make_plan(config, world.size), source, world)
        engine.load_shards(source.initial_weights(world.device))
        weights = [{name: tensor.clone() for name, tensor in engine.weights()}]
        steps = []
        for step in range(2):
            steps += train_steps(engine, world, case, [step])
            weights.append({name: tensor.clone() for name, tensor in engine.weights()})
        blocks = [module for module in engine.model.modules() if isinstance(module, ChosenExperts)]
        leaves = engine.describe()["leaf_modules"]
        reports.append({"weights": weights, "steps": steps, "used": [b.used for b in blocks], "leaves": leaves})
        engine.close()
    return reports


@cache
def seen() -> dict[str, list[dict[str, Any]]]:
    """The reports of both ranks by case: one start for all."""
    with tempfile.TemporaryDirectory() as tmp:
        by_rank = run_ranks(trained, 2, list(CASES.values()), tmp, timeout=60)
    return {name: [reports[index] for reports in by_rank] for index, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_a_single_process_s(name):
    source, case = CASES[name]
    report = seen()[name][0]
    for step in range(2):
        before, after = report["weights"][step : step + 2]
        oracle: Oracle
        if isinstance(source.hf_config, LlamaConfig):
            oracle = ExpertsOracle(source.hf_config, before)
        else:
            oracle = Oracle(source.hf_config, before, "sgd", weight_decay=0.0)
        loss, gradients = oracle.gradients(global_batch(step, ROWS))
        assert report["steps"][step]["loss"] == pytest.approx(loss, rel=1e-6)
        for parameter, expected in gradients.items():
            mine = (before[parameter].double() - after[parameter].double()) / case.lrs[0]
            if name == "only experts train" and ".mlp.experts." not in parameter:
                assert not mine.any(), parameter
            else:
                difference = float((mine - expected.double()).norm())
                assert difference < ROUNDING + 1e-5 * float(expected.norm()), parameter


def test_an_expert_had_no_token_on_one_rank_alone():
    one, other = (report["used"] for report in seen()["a list of experts"])
    alone = [mine ^ theirs for a, b in zip(one, other, strict=True) for mine, theirs in zip(a, b, strict=True)]
    assert sum(map(bool, alone)) > len(alone) / 2, (
        "every expert had tokens on both ranks: the tests show less than they say"
    )


def test_leaf_modules_are_said():
    assert {name: reports[0]["leaves"] for name, reports in seen().items()} == {
        "a list of experts": "ChosenExperts",
        "a list of experts, checkpointed": "ChosenExperts",
        "only experts train": "ChosenExperts",
        "mixtral": "MixtralSparseMoeBlock",
        "a loop over experts in one tensor": "DbrxExperts",
    }


class Named(nn.Module):
    """A module with the given children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def get_input_embeddings(self) -> nn.Module:
        return nn.Embedding(1, 1)


def several(*kinds: type[nn.Module]) -> nn.ModuleList:
    return nn.ModuleList([kind() for kind in kinds])


@pytest.mark.parametrize(
    "config, leaves", [(DBRX, {"DbrxExperts"}), (MIXTRAL, set()), (Qwen3MoeConfig(num_hidden_layers=2), set())]
)
def test_experts_in_one_tensor_are_a_leaf_where_a_loop_calls_modules(config, leaves):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {type(block).__name__ for block in expert_blocks(model)} == leaves


def test_an_indexer_that_calls_modules_in_a_loop_over_queries_is_a_leaf():
    """Qwen 4's calls one for each query with keys to choose from; DeepSeek's computes all queries at once."""
    with torch.device("meta"):
        config = Qwen4ExpTextConfig(
            indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=256, indexer_budget=16, indexer_compress_ratio=4
        )
        looping = Qwen4ExpTextQSAIndexer(config, 0)
        at_once = DeepseekV32Indexer(DeepseekV32Config(), 0)
    assert expert_blocks(Named(indexer=looping)) == [looping] and expert_blocks(Named(indexer=at_once)) == []


@pytest.mark.parametrize(
    "block, is_leaf",
    [
        (Named(experts=several(nn.ReLU, nn.ReLU)), True),
        (Named(gate=nn.ReLU(), mlp=several(nn.ReLU, nn.ReLU)), True),
        (Named(router=nn.ReLU(), ffn=nn.ModuleDict({"0": nn.ReLU(), "1": nn.ReLU()})), True),
        (Named(experts=several(nn.ReLU)), False),
        (Named(layers=several(nn.ReLU, nn.ReLU), norm=nn.ReLU()), False),
        (Named(gate_proj=nn.ReLU(), layers=several(nn.ReLU, nn.ReLU)), False),
        (Named(gate=nn.ReLU(), parts=several(nn.ReLU, nn.SiLU)), False),
    ],
)
def test_blocks_that_choose_among_modules_are_told_from_stacks_of_layers(block, is_leaf):
    mark_expert_blocks(block)
    assert leaf_class_names(block) == (["Named"] if is_leaf else [])
