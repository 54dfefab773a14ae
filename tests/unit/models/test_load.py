"""A model that is found is one that can be trained as it lies there; all else is named, with what to do."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

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


def test_an_adapter_in_the_place_of_a_model_says_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(InputError, match=r"holds an adapter .* for owner/base, not a model"):
        find(tmp_path)
