"""Models whose loss or whose packed documents would go wrong without a word are refused before the first step."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from ds_recipes.data.batch import one_document
from ds_recipes.engine.checks import check_model
from ds_recipes.engine.create import create_engine
from ds_recipes.errors import InputError
from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World
from tests.contract.engines import ENGINES
from tests.ranks.launch import run_ranks
from tests.unit.models.tiny import CONFIGS

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
EXPERTS = {**LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}

CONTAMINATING = {
    "opt": AutoConfig.for_model("opt", **SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "lfm2": AutoConfig.for_model("lfm2", **SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
    "mamba": AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8),
    "jamba": AutoConfig.for_model(
        "jamba",
        **{**LLAMA, "num_hidden_layers": 4},
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
}
"""Recurrent, convolution and position layers that run on from one document into the next; Jamba's among experts."""

BIDIRECTIONAL = {
    "gemma3 that looks both ways": AutoConfig.for_model(
        "gemma3_text", **LLAMA, head_dim=8, sliding_window=16, use_bidirectional_attention=True
    ),
    "llama with is_causal": LlamaConfig(**LLAMA, is_causal=False),
    "an encoder": AutoConfig.for_model("roberta", **SMALL, intermediate_size=48, is_decoder=False),
    "experts with is_causal": AutoConfig.for_model("qwen3_moe", **EXPERTS, num_experts=4, is_causal=False),
}


class AfterTheHeadConfig(LlamaConfig):
    model_type = "after_the_head"
    what: str = "nothing"


class AfterTheHead(LlamaForCausalLM):
    """A model that does something to its logits that no config of transformers has a name for."""

    config_class = AfterTheHeadConfig

    def __init__(self, config: AfterTheHeadConfig) -> None:
        super().__init__(config)
        self.temperature = nn.Parameter(torch.empty(1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.ones_(self.temperature)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        logits = output.logits
        what = self.config.what
        if what == "scale":
            output.logits = logits * 0.37
        elif what == "scale and cap":
            output.logits = 2.5 * torch.tanh(logits * 0.37 / 2.5)
        elif what == "wide cap":
            output.logits = 3000.0 * torch.tanh(logits / 3000.0)
        elif what == "padding":
            output.logits = logits[..., :91]
        elif what == "temperature":
            output.logits = logits * self.temperature
        elif what == "bias":
            output.logits = logits + 0.01
        elif what == "mask":
            output.logits = torch.cat([logits[..., :90], logits[..., 90:] * 0.999], dim=-1)
        elif what == "clamp":
            output.logits = logits.clamp(-30, 30)
        elif what == "of positions":
            output.logits = logits * torch.arange(1, logits.shape[1] + 1, device=logits.device)[:, None]
        return output


AutoConfig.register(AfterTheHeadConfig.model_type, AfterTheHeadConfig)
AutoModelForCausalLM.register(AfterTheHeadConfig, AfterTheHead)

KNOWN = ("nothing", "scale", "scale and cap", "wide cap", "padding")
UNKNOWN = ("temperature", "bias", "mask", "clamp", "of positions")


def after_the_head(what: str) -> AfterTheHeadConfig:
    return AfterTheHeadConfig(**LLAMA, what=what)


NOTHING = [
    "--model_config",
    "-",
    "--tokenizer_name",
    "-",
    "--train_data",
    "-",
    "--save_checkpoint_path",
    "-",
    "--max_steps",
    "9",
]


def verdicts(world: World, cases: Sequence[tuple[PretrainedConfig, str]], name: str, *more: str) -> list[str]:
    """For each (config, precision): "passes", or the refusal."""
    seen = []
    for hf_config, precision in cases:
        config = load_config([*NOTHING, "--precision", precision, "--engine", name, *more], env={})
        try:
            source = ModelSource(hf_config, None, 7, False)
            plan = make_plan(config, world.size)
            engine = create_engine(config, plan, source, world)
            engine.load_shards(source.initial_weights(world.device))
            check_model(engine, source, world, precision, 48, "Use --packing off.")
            for _ in range(plan.micro_steps):  # a check leaves nothing behind that would be in a step's way
                engine.backward(one_document(torch.arange(8)[None]), scale=1 / 8)
            assert engine.update(lr=0.0).applied
            engine.close()
            seen.append("passes")
        except InputError as error:
            seen.append(str(error))
    return seen


def on_ranks(
    ranks: int, cases: Sequence[tuple[PretrainedConfig, str]], engine: str = "deepspeed", *more: str
) -> list[str]:
    first, *others = run_ranks(verdicts, ranks, cases, engine, *more, timeout=200)
    assert all(other == first for other in others), "ranks disagree"
    return first


@pytest.mark.parametrize("engine", ENGINES)
def test_the_families_that_are_supported_pass(engine: str) -> None:
    cases = [(config, precision) for config in CONFIGS.values() for precision in ("fp32", "bf16")]
    cases += [(after_the_head(what), "fp32") for what in KNOWN]
    assert on_ranks(2 if engine == "fsdp" else 1, cases, engine) == ["passes"] * len(cases)


def attentions(world: World, configs: Sequence[PretrainedConfig]) -> list[str]:
    config = load_config([*NOTHING, "--precision", "fp32"], env={})
    sources = [ModelSource(hf_config, None, 7, False) for hf_config in configs]
    engines = [create_engine(config, make_plan(config, world.size), source, world) for source in sources]
    return [engine.attention for engine in engines]


def test_a_model_without_sdpa_takes_eager_as_transformers_does() -> None:
    configs = [
        CONFIGS["llama"],
        CONFIGS["gemma2"],
        *(AutoConfig.for_model(name, vocab_size=97, hidden_size=32, n_layer=2, n_head=4) for name in ("bloom", "ctrl")),
        CONTAMINATING["mamba"],
    ]
    (seen,) = run_ranks(attentions, 1, configs)
    fresh = [
        type(config)(**config.to_dict()) for config in configs
    ]  # other tests have built models of these with eager
    theirs = [AutoModelForCausalLM.from_config(config).config._attn_implementation for config in fresh]
    assert seen == theirs and set(seen) == {"sdpa", "eager"}


def test_activations_that_are_computed_again_are_in_no_check_s_way() -> None:
    cases = [(CONFIGS[name], "fp32") for name in ("llama", "mixtral")]
    for engine in ENGINES:
        assert on_ranks(2, cases, engine, "--activation_checkpointing") == ["passes"] * len(cases)


def test_models_whose_documents_see_each_other_are_refused_on_every_rank() -> None:
    cases = [(config, precision) for config in CONTAMINATING.values() for precision in ("fp32", "bf16")]
    for message in [*on_ranks(2, cases), *on_ranks(1, cases, "fsdp")]:
        assert "documents that share a row see each other in this model" in message and "--packing off" in message


def test_models_whose_tokens_see_their_targets_are_refused_on_every_rank() -> None:
    cases = [(config, precision) for config in BIDIRECTIONAL.values() for precision in ("fp32", "bf16")]
    for engine, ranks in (("deepspeed", 2), ("fsdp", 1)):
        messages = on_ranks(ranks, cases, engine)
        assert all("tokens of this model see what they are to predict" in message for message in messages), messages
        assert "use_bidirectional_attention: true" in messages[0] and "is_causal: false" in messages[2]
        assert "is_decoder: false" in messages[4] and "gradient by a later token" in "".join(messages)


def test_what_a_model_does_to_its_logits_is_known_or_refused() -> None:
    messages = on_ranks(2, [(after_the_head(what), "fp32") for what in UNKNOWN], "fsdp")
    assert all("AfterTheHead changes its logits after the head" in message for message in messages), messages
    assert "with something that is trained" in messages[0]
