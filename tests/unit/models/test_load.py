"""A model that is found is one that can be trained as it lies there; all else is named, with what to do."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from ds_recipes.data.tokenizer import load_tokenizer
from ds_recipes.errors import InputError
from ds_recipes.models.load import find_model
from ds_recipes.ranges import HfFolder
from ds_recipes.world.group import solo
from tests.nano import make_nano
from tests.unit.models.tiny import CONFIGS, tiny_model

BLOCK = 16


def find(folder: Path, trust_remote_code: bool = False):
    return find_model(solo(), str(folder), None, 5, trust_remote_code)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def save_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """A model in fp8 with a scale a block, as DeepSeek's are; returns what its projections stand for."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**CONFIGS["llama"].to_dict(), "dtype": "bfloat16"}))
    model.save_pretrained(folder)
    plain: dict[str, torch.Tensor] = {}

    def quantise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {}
        for name, tensor in tensors.items():
            if not name.endswith("_proj.weight"):
                made[name] = tensor
                continue
            blocks = tensor.reshape(tensor.shape[0] // BLOCK, BLOCK, tensor.shape[1] // BLOCK, BLOCK).float()
            scale = blocks.abs().amax((1, 3), keepdim=True) / 400
            codes = (blocks / scale).to(torch.float8_e4m3fn)
            made[name] = codes.reshape(tensor.shape)
            made[f"{name}_scale_inv"] = scale.reshape(blocks.shape[0], blocks.shape[2])
            plain[name] = (codes.float() * scale).reshape(tensor.shape)
        return made

    rewrite(folder, quantise)
    section = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    edit_config(folder, quantization_config=section)
    return plain


def test_fp8_is_refused_with_a_command_that_makes_a_model_of_it(tmp_path: Path) -> None:
    plain = save_fp8(tmp_path / "fp8")
    (tmp_path / "fp8" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"quantised \(quantization_config: fp8\)") as refused:
        find(tmp_path / "fp8")
    command = re.search(r'python -c "(.*?)"', str(refused.value))
    assert command is not None
    model_part = command[1].split("; t.AutoTokenizer")[0]
    exec(model_part, {})  # as a user's shell would
    source = find(tmp_path / "fp8-bf16")
    weights = source.initial_weights(torch.device("cpu"))
    for name, expected in plain.items():
        out = torch.empty(expected.numel())
        weights.read_into("fp32", name, 0, out)
        assert torch.equal(out.reshape(expected.shape), expected.bfloat16().float()), name


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32])
def test_codes_in_the_place_of_a_weight_are_refused_without_any_section(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: {**tensors, name: (tensors[name] * 50).to(dtype)})
    with pytest.raises(InputError, match=f"{name} holds {str(dtype).removeprefix('torch.')}, the codes"):
        find(tmp_path).initial_weights(torch.device("cpu"))


def test_codes_among_fused_experts_are_refused(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: {name: t.to(torch.int8) if "experts.2.w2" in name else t for name, t in tensors.items()},
    )
    with pytest.raises(InputError, match=r"experts.2.w2.weight holds int8"):
        find(tmp_path).initial_weights(torch.device("cpu"))


def test_a_files_own_scales_can_be_read_as_a_table(tmp_path: Path) -> None:
    codes = torch.arange(8, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file({"codes": codes}, tmp_path / "model.safetensors")
    assert HfFolder(tmp_path).names == ["codes"]


def test_a_pickled_models_command_makes_a_folder_that_trains_with_its_tokenizer(tmp_path: Path) -> None:
    make_nano(tmp_path)
    folder = tmp_path / "model"
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds only pickled weights") as refused:
        find(folder).initial_weights(torch.device("cpu"))
    command = re.search(r'python -c "(.*?)"', str(refused.value))
    assert command is not None
    exec(command[1], {})
    made = tmp_path / "model-safetensors"
    assert load_tokenizer(str(made), False).get_vocab() == load_tokenizer(str(folder), False).get_vocab()
    assert set(find(made).initial_weights(torch.device("cpu")).names) == set(weights)


def test_a_model_with_code_of_its_own_names_the_flag(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, model_type="of_its_own", auto_map={"AutoConfig": "configuration.Own"})
    with pytest.raises(InputError, match=r"Python code of its own.*pass --trust_remote_code"):
        find(tmp_path)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"num_attention_heads": 5}, "hidden size|hidden_size"),
        ({"model_type": "of_next_year"}, "of_next_year"),
        (
            {"rope_parameters": {"rope_type": "of_next_year"}},
            "cannot build a causal language model of type llama: KeyError .of_next_year",
        ),
        ({"hidden_size": "large"}, "hidden_size"),
    ],
)
def test_a_config_whose_values_do_not_fit_is_named(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError, match=f"(?s){tmp_path}.*({says})|({says})"):
        find(tmp_path).settled(allow_unused=False)


def test_an_adapter_in_the_place_of_a_model_says_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(InputError, match=r"holds an adapter .* for owner/base, not a model"):
        find(tmp_path)


def loaded_by_transformers(folder: Path):
    """The model as plain transformers loads it, and the names that it found no place for."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model, info["unexpected_keys"]


def whole(source) -> dict[str, torch.Tensor]:
    weights = source.initial_weights(torch.device("cpu"))
    made = {}
    for name in weights.names:
        made[name] = torch.empty(weights.shape(name))
        weights.read_into("fp32", name, 0, made[name].view(-1))
    return made


def add_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {
        name.replace("layers.1.", "layers.2."): t.clone() for name, t in tensors.items() if "layers.1." in name
    }


OTHERS = {
    "a third layer": ("llama", add_layer),
    "a third layer of experts": ("mixtral", add_layer),
    "biases that config.json does not know": (
        "llama",
        lambda t: t | {f"model.layers.{n}.self_attn.q_proj.bias": torch.ones(32) for n in range(2)},
    ),
    "norms of queries": ("llama", lambda t: t | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
    "a vision tower": ("llama", lambda t: t | {"vision_tower.patch_embed.weight": torch.ones(4, 4)}),
    "a classifier's head": ("gpt2", lambda t: t | {"score.weight": torch.ones(2, 32)}),
    "an adapter that was not merged": (
        "qwen3",
        lambda t: t | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)},
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_tensors_that_the_model_does_not_have_are_refused_by_name(tmp_path: Path, what: str) -> None:
    family, change = OTHERS[what]
    tiny_model(family).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    added = set(load_file(tmp_path / "model.safetensors")) - set(tiny_model(family).state_dict())
    _, unexpected = loaded_by_transformers(tmp_path)
    assert unexpected, "transformers knows them"
    with pytest.raises(InputError, match=r"tensors that the model of its config.json") as refused:
        find(tmp_path).settled(allow_unused=False)
    assert any(name in str(refused.value) for name in added)
    assert "--allow_unused_weights" in str(refused.value)
    source, (note,) = find(tmp_path).settled(allow_unused=True)
    assert "not part of the model" in note
    expected = dict(loaded_by_transformers(tmp_path)[0].named_parameters())
    made = whole(source)
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)


@pytest.mark.parametrize(
    "family, extra",
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
    ],
)
def test_tables_of_older_versions_are_left_out_with_a_note(tmp_path: Path, family: str, extra: str) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {extra: torch.ones(4)})
    assert not loaded_by_transformers(tmp_path)[1], "transformers says nothing of them either"
    _, (note,) = find(tmp_path).settled(allow_unused=False)
    assert extra in note and "as transformers leaves them" in note


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "qwen3"])
def test_a_head_of_its_own_is_trained_apart_as_transformers_loads_it(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    if family == "qwen3":
        model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    head = torch.randn(model.get_output_embeddings().weight.shape)
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": head})
    source, (note,) = find(tmp_path).settled(allow_unused=False)
    assert "trained apart" in note and source.hf_config.tie_word_embeddings is False
    expected = dict(loaded_by_transformers(tmp_path)[0].named_parameters())
    made = whole(source)
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
    assert torch.equal(made["lm_head.weight"], head)
    resumed = find(tmp_path)
    assert "lm_head.weight" in resumed.ties(), "a checkpoint with it in is what tells a run that goes on"
    assert "lm_head.weight" in whole(resumed.untied(["lm_head.weight"]))


def test_a_head_that_is_the_embedding_stays_tied(tmp_path: Path) -> None:
    tiny_model("llama_tied").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    source, notes = find(tmp_path).settled(allow_unused=False)
    assert notes == () and "lm_head.weight" not in whole(source)


def test_two_tensors_for_one_parameter_are_refused_unless_they_are_equal(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    name = "transformer.wpe.weight"
    rewrite(tmp_path, lambda tensors: tensors | {"wpe.weight": tensors[name].clone()})
    assert find(tmp_path).settled(False)[1] == ()
    rewrite(tmp_path, lambda tensors: tensors | {"wpe.weight": tensors[name] + 1})
    with pytest.raises(InputError, match=r"wpe.weight are both transformer.wpe.weight of the model"):
        find(tmp_path).settled(False)


@pytest.mark.parametrize("change", ["one expert is gone", "config.json has fewer", "config.json has more"])
def test_experts_are_counted_before_training(tmp_path: Path, change: str) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    if change == "one expert is gone":
        rewrite(
            tmp_path,
            lambda tensors: {
                name: t
                for name, t in tensors.items()
                if ".1.mlp.experts.2.down" not in name and "1.block_sparse_moe.experts.2.w2" not in name
            },
        )
    else:
        edit_config(tmp_path, num_local_experts=3 if "fewer" in change else 5)
    with pytest.raises(InputError, match=r"has shape \[.*, but the model of config.json needs"):
        find(tmp_path).settled(allow_unused=True)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
def test_a_folder_without_the_head_says_that_it_is_a_base_model(tmp_path: Path, family: str) -> None:
    tiny_model(family).base_model.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=[type(tiny_model(family)).__name__])
    with pytest.raises(InputError, match="Only the output head is missing"):
        find(tmp_path).settled(allow_unused=True)


def test_a_whole_file_wins_over_shards_as_in_transformers(tmp_path: Path) -> None:
    tiny_model("llama", seed=1).save_pretrained(tmp_path, max_shard_size="60KB")
    other = tmp_path / "other"
    tiny_model("llama", seed=2).save_pretrained(other)
    (other / "model.safetensors").rename(tmp_path / "model.safetensors")
    expected = dict(loaded_by_transformers(tmp_path)[0].named_parameters())
    made = whole(find(tmp_path))
    assert all(torch.equal(made[name], expected[name]) for name in expected)


def test_twelve_experts_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(**{**CONFIGS["mixtral"].to_dict(), "num_local_experts": 12})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    expected = dict(loaded_by_transformers(tmp_path)[0].named_parameters())
    made = whole(find(tmp_path).settled(False)[0])
    assert all(torch.equal(made[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module."])
def test_names_of_a_wrapper_are_shown_where_transformers_would_draw_the_weights_anew(
    tmp_path: Path, prefix: str
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    with pytest.raises(InputError, match=rf"(?s)holds no weights for 21.*other names, such as {prefix}"):
        find(tmp_path).settled(allow_unused=True)


def test_shards_of_zero3_that_were_not_gathered_are_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {name: t if "norm" in name else torch.empty(0) for name, t in tensors.items()})
    with pytest.raises(InputError, match=r"has shape \[0\].*ZeRO-3 leaves such empty tensors"):
        find(tmp_path).settled(allow_unused=True)


@pytest.mark.parametrize("other", [0.0, 1.0])
def test_a_tensor_in_two_shards_is_refused_unless_both_have_the_same_values(tmp_path: Path, other: float) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    first, *_, last = sorted(tmp_path.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(last), name: tensor + other}, last, metadata={"format": "pt"})
    if other == 0.0:
        assert find(tmp_path).settled(False)[1] == ()
        return
    with pytest.raises(InputError, match=f"both hold {name}, with different values"):
        find(tmp_path).settled(False)


def test_an_adapter_beside_a_model_is_refused_as_transformers_would_load_another_model(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(InputError, match=r"holds a model and an adapter .* for owner/base"):
        find(tmp_path)


def test_another_file_that_config_json_names_is_not_passed_over(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, transformers_weights="other.safetensors")
    with pytest.raises(InputError, match=r"transformers_weights: other.safetensors"):
        find(tmp_path)
