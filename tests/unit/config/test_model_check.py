"""Models whose weights are codes, and folders that hold something else than a model, are refused before torch is imported."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.config.check import check_inputs
from ds_recipes.config.load import load_config
from ds_recipes.config.model_check import quantised_weights

QUANTISED: dict[str, tuple[dict[str, Any], str, str]] = {
    "bitsandbytes 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bit", ".dequantize()"),
    "bitsandbytes 8": ({"load_in_8bit": True}, "bitsandbytes, 8 bit", ".dequantize()"),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq", "gptqmodel"),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq", "gptqmodel"),
    "mxfp4": ({"quant_method": "mxfp4"}, "mxfp4", "Mxfp4Config(dequantize=True)"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", "FineGrainedFP8Config(dequantize=True)"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "config_groups": {}},
        "compressed-tensors",
        "CompressedTensorsConfig(dequantize=True)",
    ),
    "hqq": ({"quant_method": "hqq", "quant_config": {}}, "hqq", "train the model that it was made from"),
    "torchao": ({"quant_method": "torchao"}, "torchao", "train the model that it was made from"),
    "quark": ({"quant_method": "quark"}, "quark", "train the model that it was made from"),
    "bitnet": ({"quant_method": "bitnet"}, "bitnet", "bf16 weights"),
    "a method of next year": ({"quant_method": "fp2"}, "fp2", "train the model that it was made from"),
    "MLX": ({"bits": 4, "group_size": 64}, "MLX, 4 bit", "train the model that it was made from"),
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("above", ["", "text_config", "thinker_config.text_config"])
def test_each_method_is_named_with_what_undoes_it(tmp_path: Path, name: str, above: str) -> None:
    section, method, remedy = QUANTISED[name]
    shape: dict[str, Any] = {"quantization_config": section}
    for part in reversed(above.split(".") if above else []):
        shape = {part: shape}
    problem = quantised_weights({"model_type": "llama", **shape}, tmp_path / "config.json")
    assert problem is not None
    where = f"{above}.quantization_config" if above else "quantization_config"
    assert f"quantised ({where}: {method})" in problem and remedy in problem


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {}},
        {"text_config": {"quantization_config": None}},
        {"quantization": {"planned": "never"}},
        "no mapping",
    ],
)
def test_plain_weights_pass(tmp_path: Path, shape: Any) -> None:
    assert quantised_weights(shape, tmp_path / "config.json") is None


@pytest.mark.parametrize(
    "file, content, method",
    [
        ("quantize_config.json", {"bits": 4, "damp_percent": 0.01, "desc_act": False}, "gptq, 4 bit"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4}, "awq, 4 bit"),
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "NVFP4"}}, "ModelOpt, NVFP4"),
    ],
)
def test_what_other_programs_write_beside_the_config_counts_too(
    tmp_path: Path, file: str, content: dict[str, Any], method: str
) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    problem = quantised_weights({}, tmp_path / "config.json")
    assert problem is not None and str(tmp_path / file) in problem and f"({file}: {method})" in problem


def test_a_quantised_cache_alone_is_no_quantised_weight(tmp_path: Path) -> None:
    content = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    assert quantised_weights({}, tmp_path / "config.json") is None


def problems(folder: Path, *flags: str) -> list[str]:
    """What the checks before torch say of the model alone."""
    needed = ["--tokenizer_name", "owner/name", "--train_data", "owner/data", "--save_checkpoint_path", str(folder)]
    found = check_inputs(load_config([*needed, *flags], env={}))
    return [problem for problem in found if "model" in problem]


def test_a_run_with_a_quantised_model_is_refused_before_torch(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    for flags in (("--model_name", str(model)), ("--model_config", str(model / "config.json"))):
        (problem,) = problems(tmp_path, *flags)
        assert f"{flags[0]} {flags[1]} (command line)" in problem and "gptq" in problem


def test_an_adapter_says_that_it_is_one_and_how_to_merge_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    (problem,) = problems(tmp_path, "--model_name", str(tmp_path))
    assert "holds an adapter" in problem and "for owner/base" in problem
    assert "merge_and_unload()" in problem and "T.from_pretrained('owner/base')" in problem


def test_a_gguf_folder_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    (problem,) = problems(tmp_path, "--model_name", str(tmp_path))
    assert "llama.cpp (model-Q4_K_M.gguf)" in problem


@pytest.mark.parametrize("positions, problem", [(-1, False), (0, False), (64, True), (8192, False)])
def test_a_model_without_a_limit_of_positions_takes_any_context(tmp_path: Path, positions: int, problem: bool) -> None:
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps({"model_type": "xlnet", "max_position_embeddings": positions}))
    found = problems(tmp_path, "--model_config", str(shape), "--context_size", "512")
    assert bool(found) == problem
