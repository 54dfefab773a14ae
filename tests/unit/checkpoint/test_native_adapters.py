"""LoRA in a checkpoint, merged while it is read or given as an adapter: PEFT itself says what is right."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.whole import export
from ds_recipes.checkpoint.native import open_full_state, with_adapters
from ds_recipes.errors import InputError
from ds_recipes.ranges import RangeReader

IDS = torch.arange(12).reshape(1, 12)


def llama(tied: bool = False) -> PreTrainedModel:
    sizes = {"hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=41, num_key_value_heads=1, tie_word_embeddings=tied, **sizes))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=24, n_layer=2, n_head=3, n_positions=32))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (llama, {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rank-stabilised": (llama, {"r": 5, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"}),
    "some modules differ": (
        llama,
        {
            "r": 3,
            "lora_alpha": 7,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 2},
            "alpha_pattern": {"layers.1.mlp.up_proj": 11, "q_proj": 5},
        },
    ),
    "a head that trains in full": (
        llama,
        {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    ),
    "the embedding": (llama, {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "k_proj"]}),
    "turned weights": (gpt2, {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


@dataclass(frozen=True)
class Trained:
    """A model with an adapter that has learned something, and its whole state in a file with the settings beside it."""

    model: Any
    make: Any
    file: Path


def train(folder: Path, name: str, **changes: Any) -> Trained:
    make, settings = CASES[name]
    torch.manual_seed(0)
    model = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", **settings, **changes))
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name or "modules_to_save" in parameter_name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    torch.save(model.state_dict(), folder / "model.pt")
    saved = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in model.peft_config["default"].to_dict().items()
    }
    (folder / "adapter_config.json").write_text(json.dumps(saved, default=str))
    return Trained(model.eval(), make, folder / "model.pt")


def whole(reader: RangeReader, name: str) -> torch.Tensor:
    flat = torch.empty(torch.Size(reader.shape(name)).numel())
    for start in range(0, flat.numel(), 37):
        reader.read_into("fp32", name, start, flat[start : start + 37])
    return flat.reshape(reader.shape(name))


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_compute_what_peft_merges(tmp_path: Path, name: str) -> None:
    trained = train(tmp_path, name)
    reader = with_adapters(open_full_state(trained.file), None, merge=True)
    with torch.no_grad():
        unmerged = trained.model(IDS).logits
        plain = trained.make()
        state = {name: whole(reader, name) for name in reader.names}
        missing, unexpected = plain.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, "a tied head has the embedding's values"
        plain.tie_weights()
        ours = plain.eval()(IDS).logits
        merged = trained.model.merge_and_unload()
        theirs = merged(IDS).logits
    assert torch.allclose(ours, theirs, atol=2e-6) and torch.allclose(ours, unmerged, atol=1e-5)
    for weight, tensor in merged.state_dict().items():
        if weight in state:
            assert torch.allclose(state[weight], tensor, atol=1e-6), weight
    base = trained.make()(IDS).logits
    assert not torch.allclose(ours, base, atol=1e-2), "the adapter did something"


@pytest.mark.parametrize("name", CASES)
def test_the_adapter_alone_loads_in_peft(tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    trained = train(tmp_path, name)
    reader = with_adapters(open_full_state(trained.file), None, merge=False)
    (tmp_path / "adapter").mkdir()
    save_file({name: whole(reader, name) for name in reader.names}, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_bytes((tmp_path / "adapter_config.json").read_bytes())
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(trained.make(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, trained.model(IDS).logits)
    trained.model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    theirs = open_safetensors(tmp_path / "theirs" / "adapter_model.safetensors")
    assert theirs == {name: reader.shape(name) for name in reader.names}


def open_safetensors(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors.torch import load_file

    return {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}


def test_without_adapters_the_reader_is_as_it_was(tmp_path: Path) -> None:
    torch.save(llama().state_dict(), tmp_path / "model.pt")
    reader = open_full_state(tmp_path / "model.pt")
    assert with_adapters(reader, None, merge=True) is reader


def test_the_settings_may_lie_elsewhere(tmp_path: Path) -> None:
    trained = train(tmp_path, "plain")
    (tmp_path / "adapter_config.json").rename(tmp_path / "other.json")
    reader = open_full_state(trained.file)
    with pytest.raises(InputError, match=r"no adapter_config\.json lies beside it.*--adapter_config"):
        with_adapters(reader, None, merge=True)
    assert with_adapters(reader, tmp_path / "other.json", merge=True).names
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"other\.json: not the settings of a LoRA adapter"):
        with_adapters(reader, tmp_path / "other.json", merge=True)


def test_what_is_not_plain_lora_is_refused(tmp_path: Path) -> None:
    trained = train(tmp_path, "plain", use_dora=True)
    with pytest.raises(InputError, match=r"lora_magnitude_vector.* not plain LoRA"):
        with_adapters(open_full_state(trained.file), None, merge=True)
    state = train(tmp_path, "plain").model.state_dict()
    two = state | {
        name.replace(".default.", ".second."): tensor + 1 for name, tensor in state.items() if "lora_" in name
    }
    torch.save(two, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"several adapters \(default, second\)"):
        with_adapters(open_full_state(tmp_path / "model.pt"), None, merge=True)


def test_without_the_frozen_weights_nothing_is_merged(tmp_path: Path) -> None:
    state = train(tmp_path, "plain").model.state_dict()
    torch.save({name: tensor for name, tensor in state.items() if "lora_" in name}, tmp_path / "model.pt")
    reader = open_full_state(tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"q_proj\.weight is not in it.*--lora adapter"):
        with_adapters(reader, None, merge=True)
    assert len(with_adapters(reader, None, merge=False).names) == 12


@pytest.mark.parametrize("name", ["plain", "a head that trains in full", "turned weights"])
def test_a_checkpoint_without_frozen_parameters_is_merged_into_its_base(name: str, tmp_path: Path) -> None:
    """As the Trainer saves one with DeepSpeed: the frozen weights come from --model; PEFT says what is right."""
    trained = train(tmp_path, name)
    torch.manual_seed(0)
    trained.make().save_pretrained(tmp_path / "base")
    state = torch.load(trained.file)
    learned = {key: value for key, value in state.items() if "lora_" in key or "modules_to_save" in key}
    torch.save(learned, trained.file)
    checked = name == "plain"
    made = export(trained.file, tmp_path / "hf", Wanted(model=str(tmp_path / "base"), lora="merge", load_check=checked))
    assert made.difference is None if not checked else made.difference is not None and made.difference < 1e-5
    ours = type(trained.make()).from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert torch.allclose(ours(IDS).logits, trained.model(IDS).logits, atol=1e-5)
        assert not torch.allclose(
            ours(IDS).logits, type(ours).from_pretrained(tmp_path / "base")(IDS).logits, atol=1e-2
        )
    with pytest.raises(InputError, match="Name the base model's folder with --model"):
        with_adapters(open_full_state(trained.file), None, merge=True)
