"""Models whose loss or whose packed documents would go wrong without a word are refused before the first step."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from ds_recipes.engine.checks import check_isolation, check_loss_head
from ds_recipes.engine.create import create_engine
from ds_recipes.errors import InputError
from ds_recipes.models.load import ModelSource
from ds_recipes.models.loss_head import LogitTransform
from ds_recipes.world.group import World
from tests.contract.engines import ENGINES
from tests.ranks.launch import run_ranks
from tests.unit.models.tiny import CONFIGS

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONTAMINATING = {
    "opt": AutoConfig.for_model("opt", **SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "lfm2": AutoConfig.for_model("lfm2", **SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
}


def verdicts(world: World, cases: Sequence[tuple[PretrainedConfig, str, bool]], name: str) -> list[str]:
    """For each (config, precision, whether what the model does to its logits is hidden): "passes", or the refusal."""
    honest = LogitTransform.of
    seen = []
    for hf_config, precision, hidden in cases:
        LogitTransform.of = classmethod(lambda cls, _: cls()) if hidden else honest  # type: ignore[method-assign]
        attention = "eager" if hf_config.model_type == "gemma2" else "sdpa"
        flags = ["--model_config", "-", "--tokenizer_name", "-", "--train_data", "-", "--save_checkpoint_path", "-"]
        flags += ["--max_steps", "9", "--precision", precision, "--attn_implementation", attention]
        flags += ["--engine", name]
        config = load_config(flags, env={})
        try:
            source = ModelSource(hf_config, None, 7, False)
            engine = create_engine(config, make_plan(config, world.size), source, world)
            engine.load_shards(source.initial_weights(world.device))
            check_loss_head(engine, source.vocabulary_size, precision)
            check_isolation(engine, source, precision, "Use --packing off.")
            engine.close()
            seen.append("passes")
        except InputError as error:
            seen.append(str(error))
    return seen


def on_ranks(ranks: int, cases: Sequence[tuple[PretrainedConfig, str, bool]], engine: str = "deepspeed") -> list[str]:
    first, *others = run_ranks(verdicts, ranks, cases, engine, timeout=200)
    assert all(other == first for other in others), "ranks disagree"
    return first


@pytest.mark.parametrize("engine", ENGINES)
def test_the_families_that_are_supported_pass(engine: str) -> None:
    cases: list[Any] = [(config, precision, False) for config in CONFIGS.values() for precision in ("fp32", "bf16")]
    assert on_ranks(2 if engine == "fsdp" else 1, cases, engine) == ["passes"] * len(cases)


def test_models_whose_documents_see_each_other_are_refused_on_every_rank() -> None:
    cases: list[Any] = [(config, "fp32", False) for config in CONTAMINATING.values()]
    for message in [*on_ranks(2, cases), *on_ranks(1, cases, "fsdp")]:
        assert "documents that share a row see each other in this model" in message and "--packing off" in message


def test_a_change_of_the_logits_that_is_not_known_is_refused() -> None:
    capped = copy.deepcopy(CONFIGS["gemma2"])
    capped.final_logit_softcapping = 0.01
    for message in on_ranks(1, [(config, "fp32", True) for config in (CONFIGS["granite"], CONFIGS["cohere"], capped)]):
        assert "changes its logits after the head" in message
