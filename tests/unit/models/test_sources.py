"""Initial weights as ranges: equal to what transformers itself loads or draws, whatever the split into ranks."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel, LlamaRMSNorm

from ds_recipes.errors import InputError
from ds_recipes.models.skeleton import build_skeleton, parameter_shapes, saved_buffers, tied_names
from ds_recipes.models.sources import FolderWeights, random_weights
from tests.unit.models.tiny import CONFIGS, MIXED, WITH_BUFFERS, tiny_model

CPU = torch.device("cpu")
FAMILIES = sorted(CONFIGS)


def skeleton(family: str):
    return build_skeleton(CONFIGS[family], torch.float32, "eager", CPU, False)


def read_all(reader, shapes, ranks: int) -> dict[str, torch.Tensor]:
    """Every parameter, each rank reading its even slice of the flattened tensor."""
    full = {}
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        share = -(-numel // ranks)
        slices = []
        for rank in range(ranks):
            out = torch.empty(max(0, min(share, numel - rank * share)))
            reader.read_into("fp32", name, rank * share, out)
            slices.append(out)
        full[name] = torch.cat(slices).reshape(shape)
    return full


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_folder_reads_as_transformers_loads_it(tmp_path, family, ranks, capfd):
    """Mixtral's experts are fused on loading, so its folder holds other names and shapes than the model."""
    tiny_model(family).save_pretrained(tmp_path, max_shard_size="60KB")
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).named_parameters())
    model = skeleton(family)
    capfd.readouterr()
    loaded = read_all(FolderWeights(model, tmp_path), parameter_shapes(model), ranks)
    assert capfd.readouterr() == ("", ""), "a progress bar for each tensor on each rank"
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name]), name
    assert all(parameter.is_meta for parameter in model.parameters()), "the reader kept whole tensors"


@pytest.mark.parametrize("family", sorted(WITH_BUFFERS))
def test_saved_buffers_are_read_as_transformers_loads_them(tmp_path, family):
    """minimax_m2's lies in its files under another name; deepseek_v4 has tables of whole numbers."""
    tiny_model(family).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        model = build_skeleton(copy.deepcopy(WITH_BUFFERS[family]), dtype, "eager", CPU, False)
        own, read = saved_buffers(model), FolderWeights(model, tmp_path).buffers
        theirs = {name: buffer for name, buffer in expected.named_buffers() if name in expected.state_dict()}
        assert own.keys() == read.keys() == theirs.keys()
        for name, buffer in theirs.items():
            assert own[name].dtype == buffer.dtype, name
            assert torch.equal(read[name].to(buffer.dtype), buffer), name


@pytest.mark.parametrize("family", sorted(WITH_BUFFERS))
def test_first_buffers_are_the_models_own(family):
    reference = AutoModelForCausalLM.from_config(copy.deepcopy(WITH_BUFFERS[family]), dtype=torch.float32)
    model = build_skeleton(copy.deepcopy(WITH_BUFFERS[family]), torch.float32, "eager", CPU, False)
    made = saved_buffers(model)
    assert made.keys() == saved_buffers(reference).keys()
    for name, buffer in saved_buffers(reference).items():
        assert torch.equal(made[name], buffer), name


def test_a_folder_without_one_buffer_is_refused_by_name(tmp_path):
    tiny_model("glm4_moe").save_pretrained(tmp_path)
    _rewrite(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if not name.endswith("_bias")})
    model = build_skeleton(copy.deepcopy(WITH_BUFFERS["glm4_moe"]), torch.float32, "eager", CPU, False)
    with pytest.raises(InputError, match=r"holds no value for model.layers.1.mlp.gate.e_score_correction_bias"):
        FolderWeights(model, tmp_path)


@pytest.mark.parametrize("family", [*sorted(WITH_BUFFERS), *MIXED])
def test_a_skeleton_has_the_dtypes_of_a_loaded_model(tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        own = build_skeleton(copy.deepcopy(({**WITH_BUFFERS, **MIXED})[family]), dtype, "eager", CPU, False)
        expected = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
        assert {name: parameter.dtype for name, parameter in own.named_parameters()} == expected
        assert {n: b.dtype for n, b in saved_buffers(own).items()} == {
            n: b.dtype for n, b in saved_buffers(loaded).items()
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_do_not_depend_on_the_split_and_look_like_the_models_own(family):
    model = skeleton(family)
    shapes = parameter_shapes(model)
    one, three = (read_all(random_weights(skeleton(family), 5, CPU), shapes, ranks) for ranks in (1, 3))
    other_seed = read_all(random_weights(skeleton(family), 6, CPU), shapes, 1)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32, attn_implementation="eager")
    for name, own in reference.named_parameters():
        assert torch.equal(one[name], three[name]), name
        assert one[name].std() == pytest.approx(own.std().item(), rel=0.25, abs=1e-8), name
        assert one[name].mean() == pytest.approx(own.mean().item(), abs=0.1 * own.std().item() + 1e-3), name
    matrices = [name for name, tensor in one.items() if tensor.ndim >= 2]
    assert all(not torch.equal(one[name], other_seed[name]) for name in matrices)


def test_two_layers_do_not_get_the_same_random_weights():
    weights = read_all(random_weights(skeleton("llama"), 5, CPU), parameter_shapes(skeleton("llama")), 1)
    first, second = (weights[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeletons_buffers_are_the_models_own(family):
    reference = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32, attn_implementation="eager")
    buffers = dict(skeleton(family).named_buffers())
    for name, buffer in reference.named_buffers():
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name].dtype == buffer.dtype, name


def test_rotary_frequencies_stay_float32_in_a_bfloat16_skeleton():
    model = build_skeleton(CONFIGS["llama"], torch.bfloat16, "sdpa", CPU, False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert dict(model.named_buffers())["model.rotary_emb.inv_freq"].dtype == torch.float32


def test_tied_names_name_the_head_by_the_embedding():
    assert tied_names(skeleton("llama_tied")) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied_names(skeleton("llama")) == {}


def _rewrite(folder: Path, change) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def test_a_base_models_folder_without_the_prefix_is_read(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    _rewrite(tmp_path, lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    model = skeleton("gpt2")
    loaded = read_all(FolderWeights(model, tmp_path), parameter_shapes(model), 2)
    assert torch.equal(
        loaded["transformer.wte.weight"], dict(tiny_model("gpt2").named_parameters())["transformer.wte.weight"]
    )


def test_a_tied_folder_that_holds_only_the_head_is_read(tmp_path):
    tiny_model("llama_tied").save_pretrained(tmp_path)
    _rewrite(
        tmp_path, lambda tensors: {"lm_head.weight" if "embed" in name else name: t for name, t in tensors.items()}
    )
    model = skeleton("llama_tied")
    assert "model.embed_tokens.weight" in read_all(FolderWeights(model, tmp_path), parameter_shapes(model), 2)


def test_a_folder_without_one_parameter_is_refused_by_name(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    _rewrite(
        tmp_path,
        lambda tensors: {name: t for name, t in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"},
    )
    with pytest.raises(
        InputError, match=r"(?s)holds no weights for 1 of the model's \d+ parameters.*model.layers.1.mlp.up_proj.weight"
    ):
        FolderWeights(skeleton("llama"), tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(InputError, match="do not belong together"):
        changed = CONFIGS["llama"].__class__(**{**config, "intermediate_size": 64})
        FolderWeights(build_skeleton(changed, torch.float32, "eager", CPU, False), tmp_path)


def test_a_router_loss_is_refused():
    config = CONFIGS["mixtral"].__class__(**{**CONFIGS["mixtral"].to_dict(), "output_router_logits": True})
    with pytest.raises(InputError, match="output_router_logits"):
        build_skeleton(config, torch.float32, "eager", CPU, False)


def test_a_model_without_sdpa_says_what_to_set():
    with pytest.raises(InputError, match="--attn_implementation eager"):
        build_skeleton(CONFIGS["gemma2"], torch.float32, "sdpa", CPU, False)


CONSTRUCTED = {
    "openai-gpt": AutoConfig.for_model("openai-gpt", vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "data2vec-text": AutoConfig.for_model(
        "data2vec-text", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
}


@pytest.mark.parametrize("model_type", CONSTRUCTED)
def test_what_only_constructors_set_is_set_as_they_do(model_type):
    """GPT-1's projections are set in no `_init_weights`; of a head's shared bias the second name alone is."""
    config = CONSTRUCTED[model_type]
    model = build_skeleton(copy.deepcopy(config), torch.float32, "eager", CPU, False)
    made = read_all(random_weights(model, 5, CPU), parameter_shapes(model), 1)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for name, own in reference.named_parameters():
        assert made[name].std() == pytest.approx(own.std().item(), rel=0.25, abs=1e-8), name
        assert made[name].mean() == pytest.approx(own.mean().item(), abs=0.1 * own.std().item() + 1e-3), name


def without(monkeypatch, kind):
    """Llama as a class that leaves modules of one kind out of `_init_weights`."""
    plain = LlamaPreTrainedModel._init_weights
    monkeypatch.setattr(
        LlamaPreTrainedModel,
        "_init_weights",
        lambda self, module: None if isinstance(module, kind) else plain(self, module),
    )
    return skeleton("llama")


@pytest.mark.parametrize(
    "kind, names", [(nn.Linear, ["model.layers.0.mlp.up_proj.weight"]), (nn.Embedding, ["model.embed_tokens.weight"])]
)
def test_torchs_own_modules_are_set_as_their_constructors_do(monkeypatch, kind, names):
    model = without(monkeypatch, kind)
    made = read_all(random_weights(model, 5, CPU), parameter_shapes(model), 3)
    assert all(tensor.isfinite().all() for tensor in made.values())
    for name in names:
        shape = made[name].shape
        own = nn.Embedding(*shape) if kind is nn.Embedding else nn.Linear(shape[1], shape[0])
        assert made[name].std() == pytest.approx(own.weight.std().item(), rel=0.1), name


def test_a_parameter_that_nothing_sets_is_refused_by_name_before_it_is_drawn(monkeypatch):
    with pytest.raises(
        InputError, match=r"(?s)does not set 5 of its parameters.*layers.0.input_layernorm.weight.*--model_name"
    ):
        random_weights(without(monkeypatch, LlamaRMSNorm), 5, CPU)
