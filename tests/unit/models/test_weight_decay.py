"""Which parameters decay, in models of many kinds, against what their authors say and what transformers' Trainer spares."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer

from ds_recipes.models.weight_decay import decayed_names, weight_decay_of

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
MAMBA = SMALL | {"num_hidden_layers": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
MODELS = {
    "llama": SMALL,
    "cohere": SMALL | {"use_qk_norm": True},
    "gpt_oss": EXPERTS,
    "mixtral": EXPERTS,
    "jamba": MAMBA | {"mamba_dt_rank": 4},
    "mamba": SMALL,
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "stablelm": SMALL | {"qk_layernorm": True, "use_qkv_bias": True},
    "recurrent_gemma": SMALL | {"lru_width": 32, "num_hidden_layers": 3, "head_dim": 8},
    "rwkv": {"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2},
}


def built(kind: str) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **MODELS[kind])
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize(
    "kind, spared, decayed",
    [
        ("llama", r"norm\.weight|layernorm\.weight", r"_proj\.weight|embed_tokens\.weight|lm_head\.weight"),
        ("cohere", r"[qk]_norm\.weight|layernorm\.weight|\.norm\.weight", r"_proj\.weight|embed_tokens\.weight"),
        (
            "gpt_oss",
            r"experts\.(gate_up|down)_proj_bias|sinks|router\.bias|proj\.bias|norm\.weight",
            r"experts\.(gate_up|down)_proj$|router\.weight|_proj\.weight|embed_tokens\.weight|lm_head\.weight",
        ),
        ("mixtral", r"norm\.weight", r"experts\.\w+_proj$|gate\.weight|_proj\.weight|embed_tokens\.weight|lm_head"),
        (
            "jamba",
            r"\.A_log|\.D$|dt_proj\.bias|conv1d\.bias|norm\.weight",
            r"experts\.\w+_proj$|router\.weight|proj\.weight|conv1d\.weight|embed_tokens\.weight|lm_head",
        ),
        ("mamba", r"\.A_log|\.D$|\.bias$|norm(_f)?\.weight", r"proj\.weight|conv1d\.weight|embeddings\.weight"),
        ("gpt2", r"bias$|ln_\w\.weight", r"w[tp]e\.weight|c_\w+\.weight"),
        ("stablelm", r"bias$|norm\w*(\.norms\.\d+)?\.weight", r"_proj\.weight|embed_tokens\.weight|lm_head\.weight"),
        (
            "recurrent_gemma",
            r"bias$|recurrent_param|norm\.weight",
            r"gate_weight|(proj|conv_1d|out|_[xy])\.weight|embed",
        ),
        (
            "rwkv",
            r"time_(mix|decay|first)\w*|ln\w*\.(weight|bias)",
            r"(key|value|receptance|output)\.weight|embed|head",
        ),
    ],
)
def test_what_decays_follows_from_the_module_and_the_name(kind, spared, decayed):
    model = built(kind)
    verdicts = weight_decay_of(model)
    assert verdicts.keys() == {name for name, _ in model.named_parameters()}
    wrongly_decayed = [name for name, one in verdicts.items() if one.spared is None and not re.search(decayed, name)]
    wrongly_spared = [name for name, one in verdicts.items() if one.spared and not re.search(spared, name)]
    assert not wrongly_decayed and not wrongly_spared
    assert any(one.spared for one in verdicts.values()), "the pattern of what is spared shows nothing"


@pytest.mark.parametrize("kind", MODELS)
def test_all_that_transformers_trainer_spares_is_spared(kind):
    model = built(kind)
    theirs = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert decayed_names(model) <= theirs


class Owner(nn.Module):
    """A module with one parameter of a given name and shape."""

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.empty(*shape)))


class PlainRMSNorm(Owner):
    pass


class NormHead(Owner):
    """Baichuan's head, a linear layer whose rows are normalised."""


class Marked(Owner):
    def __init__(self, name: str, *shape: int) -> None:
        super().__init__(name, *shape)
        getattr(self, name)._no_weight_decay = True


@pytest.mark.parametrize(
    "attribute, module, why",
    [
        ("q_norm", PlainRMSNorm("weight", 4, 8), "norm"),
        ("k_norm", Owner("weight", 4, 8), "norm"),
        ("lm_head", NormHead("weight", 64, 8), None),
        ("mixer", Marked("decay_matrix", 8, 8), "marked by the model"),
        ("mixer", Owner("A_log", 1, 1, 4, 8), "rate"),
        ("mixer", Owner("dt_bias", 4, 8), "bias"),
        ("router", Owner("e_score_correction_bias", 4, 8), "bias"),
        ("router", Owner("weight", 4, 8), None),
        ("experts", Owner("down_proj_bias", 4, 8), "bias"),
        ("experts", Owner("down_proj", 4, 8, 8), None),
        ("tower", Owner("class_token", 1, 1, 8), "vector"),
        ("block", Owner("residual_scale", 2, 8), "gain"),
        ("norm", nn.Linear(8, 8, bias=False), None),
        ("shared_expert_gate", nn.Linear(8, 1, bias=False), None),
        ("relative_attention_bias", nn.Embedding(8, 4), None),
        ("projections", nn.ParameterList([torch.empty(4, 8)]), None),
        ("norm_weights", nn.ParameterList([torch.empty(4, 8)]), "norm"),
        ("attention", nn.MultiheadAttention(8, 2, bias=False), None),
    ],
)  # fmt: skip
def test_names_and_kinds_of_which_dimensions_tell_nothing(attribute, module, why):
    parent = nn.Module()
    parent.add_module(attribute, module)
    assert {one.spared for one in weight_decay_of(parent).values()} == {why}


def test_a_tied_parameter_has_one_verdict_and_a_frozen_one_none():
    parent = nn.Module()
    parent.add_module("embed", nn.Embedding(8, 4))
    parent.add_module("head", nn.Linear(4, 8))
    parent.head.weight = parent.embed.weight  # type: ignore[union-attr]
    parent.head.bias.requires_grad_(False)  # type: ignore[union-attr,operator]
    assert decayed_names(parent) == weight_decay_of(parent).keys() == {"embed.weight"}
