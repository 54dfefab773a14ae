"""An export is read by transformers 4 as by transformers 5: same positions, same tokens. The older names come back.

The daily tests compare with config.json files in the form in which the hub has them from transformers 4; the slow one makes
an environment with transformers 4.57 and asks it for logits and tokens.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ds_recipes.checkpoint.export.transformers4 import portable_config, portable_tokenizer_config
from ds_recipes.checkpoint.export.whole import export
from tests.unit.checkpoint.export_material import checkpoint_of

OLD = "transformers==4.57.1", "tokenizers>=0.22,<=0.23.0", "huggingface_hub<1.0"
NAMES = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "rotary_emb_base", "rotary_pct")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.2,
    "torch_dtype": "float32",
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "yarn"}
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}
LONGROPE = {"type": "longrope", "short_factor": [1.1] * 8, "long_factor": [4.0] * 8}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 1, "topk_group": 1}

WRITTEN_BY_4: dict[str, dict[str, Any]] = {
    "llama 3": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}},
    "mistral": {"model_type": "mistral", "rope_theta": 1e6, "head_dim": 16, "sliding_window": None},
    "qwen 2.5": {"model_type": "qwen2", "rope_theta": 3e5, "use_sliding_window": False},
    "qwen 2.5 with yarn": {"model_type": "qwen2", "rope_theta": 3e5, "rope_scaling": YARN},
    "gemma 2": {"model_type": "gemma2", "rope_theta": 2e5, "head_dim": 16, "sliding_window": 16},
    "gemma 3": {
        "model_type": "gemma3_text",
        "rope_theta": 1e6,
        "rope_local_base_freq": 5e3,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi 3": {
        "model_type": "phi3",
        "rope_theta": 2e4,
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 128,
        "partial_rotary_factor": 1.0,
    },
    "deepseek v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "rope_theta": 2e4,
        "rope_scaling": {**YARN, "type": "yarn", "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        **MLA,
        **EXPERTS,
    },
    "gpt-neox": {"model_type": "gpt_neox", "rotary_emb_base": 5e3, "rotary_pct": 0.5},
    "stablelm": {"model_type": "stablelm", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
    "glm 4": {"model_type": "glm4", "rope_theta": 2e4, "partial_rotary_factor": 0.5, "head_dim": 16},
}


def read_config(folder: Path, settings: dict[str, Any]) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES | settings))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("family", WRITTEN_BY_4)
def test_the_names_of_transformers_4_come_back(family: str, tmp_path: Path) -> None:
    """And transformers 5 reads the same from both: the folder that was written, read, and written again."""
    given = SIZES | WRITTEN_BY_4[family]
    config = read_config(tmp_path, WRITTEN_BY_4[family])
    written, note = portable_config(config, ())
    assert note is None
    for name in NAMES:
        found, expected = written.get(name), given.get(name)
        if isinstance(expected, dict):
            assert {key: found.get(key) for key in expected} == expected, name
        elif expected is not None or name == "rope_scaling":
            assert found == expected, name
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert written["rope_parameters"] == json.loads(config.to_json_string())["rope_parameters"]
    again = read_config(tmp_path / "again", {**written, "model_type": given["model_type"]})
    assert portable_config(again, ()) == (written, None)


def test_a_config_of_several_models_has_the_names_in_each(tmp_path: Path) -> None:
    text = {key: value for key, value in (SIZES | WRITTEN_BY_4["gemma 3"]).items() if key != "torch_dtype"}
    config = read_config(tmp_path, {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 32}})
    written = portable_config(config, ())[0]["text_config"]
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (1e6, 5e3)
    assert written["rope_scaling"]["factor"] == 8.0


def test_names_that_would_change_what_is_read_are_left_out(tmp_path: Path) -> None:
    """A rope for each kind of layer, in a model that has one name for both: transformers 5 would take it for all layers."""
    kinds = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    layers = {"sliding_attention": kinds[0], "full_attention": kinds[1]}
    settings = {"model_type": "gemma4_text", "rope_parameters": layers, "head_dim": 16, "sliding_window": 16}
    config = read_config(tmp_path, settings)
    written, note = portable_config(config, ())
    assert note is not None and "only transformers 5" in note
    again = read_config(tmp_path / "again", written)
    assert again.rope_parameters == config.rope_parameters


def test_code_that_is_not_in_the_folder_is_not_named(tmp_path: Path) -> None:
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "owner/name--modeling_x.XForCausalLM"}
    config = read_config(tmp_path, {**WRITTEN_BY_4["mistral"], "auto_map": code})
    assert "auto_map" not in portable_config(config, ())[0]
    assert portable_config(config, ("modeling_x.py",))[0]["auto_map"] == {
        "AutoModelForCausalLM": "modeling_x.XForCausalLM"
    }


def make_tokenizer(folder: Path, **settings: Any) -> None:
    """A SentencePiece-like tokenizer, or (class GPT-2's kind) a byte-level one, with tokenizer_config.json as 4.x has it."""
    folder.mkdir(parents=True, exist_ok=True)
    specials = ["<s>", "</s>", "<unk>", "<|im_end|>"]
    byte_level = settings["tokenizer_class"] not in ("LlamaTokenizerFast", "LlamaTokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else [*"▁abcdefghijklmnopqrstuvwxyz.0123456789"]
    vocabulary = {token: number for number, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    if byte_level:
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    else:
        replace = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    tokenizer.add_special_tokens(specials)
    if settings.get("add_bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings))


TOKENIZERS: dict[str, dict[str, Any]] = {
    "plain": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "with added tokens": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|im_end|>"],
        "add_bos_token": True,
    },
    "qwen's": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None},
    "llama's without bos": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, "legacy": False},
    "llama's": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False},
}


def written_anew(folder: Path, out: Path) -> dict[str, Any]:
    """What transformers 5 writes of a tokenizer, made portable into `out`."""
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    given = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    path = out / "tokenizer_config.json"
    path.write_bytes(portable_tokenizer_config(path.read_bytes(), (out / "tokenizer.json").read_bytes(), (), given))
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_keeps_its_class_and_its_tokens(kind: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "given", **TOKENIZERS[kind])
    settings = written_anew(tmp_path / "given", tmp_path / "written")
    assert settings["tokenizer_class"] == TOKENIZERS[kind]["tokenizer_class"]
    assert not settings.keys() & {"is_local", "local_files_only", "extra_special_tokens", "name_or_path"}
    assert settings["added_tokens_decoder"]["1"]["content"] == "</s>"
    if "Llama" in settings["tokenizer_class"]:
        assert settings["add_bos_token"] is TOKENIZERS[kind]["add_bos_token"]
    text = "a b<|im_end|> c"
    given, again = (AutoTokenizer.from_pretrained(tmp_path / name)(text).input_ids for name in ("given", "written"))
    assert given == again


def test_a_class_that_only_transformers_5_has_is_replaced() -> None:
    written = json.dumps({"tokenizer_class": "TokenizersBackend", "is_local": True, "extra_special_tokens": ["<x>"]})
    settings = json.loads(portable_tokenizer_config(written.encode(), None, ()))
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "additional_special_tokens": ["<x>"],
    }


READ_BY_4 = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
transformers.logging.set_verbosity_error()
for folder, probe in json.loads(sys.argv[2]):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    known = load_file(probe)
    with torch.inference_mode():
        difference = (model(known["input_ids"]).logits - known["logits"]).abs().max() / known["logits"].abs().max()
    encoded = tokenizer("a b<|im_end|> c")
    print(json.dumps([float(difference), str(model.dtype), encoded["input_ids"], sorted(encoded), tokenizer.eos_token]))
"""


@pytest.mark.slow
def test_transformers_4_computes_the_same_from_an_export(tmp_path: Path) -> None:
    """Every family with one of the tokenizers; over positions that tell one rope from another."""
    old = tmp_path / "transformers4"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(old), *OLD]
    subprocess.run(pip, check=True, capture_output=True, text=True, timeout=600)
    kinds, folders, tokens = list(TOKENIZERS), [], []
    for number, (family, settings) in enumerate(WRITTEN_BY_4.items()):
        place = tmp_path / str(number)
        make_tokenizer(place / "tokenizer", **TOKENIZERS[kinds[number % len(kinds)]])
        torch.manual_seed(number)
        config = read_config(place / "config", settings)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        written_anew(place / "tokenizer", place / "written")
        files = {path.name: path.read_bytes() for path in (place / "written").iterdir()}
        out = place / "hf"
        checkpoint = checkpoint_of(model, place, files, positions=100)
        assert export(checkpoint, out).difference is not None, family
        folders.append((str(out), str(checkpoint / "probe.safetensors")))
        tokens.append(AutoTokenizer.from_pretrained(place / "written")("a b<|im_end|> c").input_ids)
    command = [sys.executable, "-c", READ_BY_4, str(old), json.dumps(folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(WRITTEN_BY_4)
    for family, row, expected in zip(WRITTEN_BY_4, rows, tokens, strict=True):
        difference, dtype, ids, names, eos = row
        assert difference < 2e-5, f"{family}: {difference}"
        assert (dtype, ids, names, eos) == ("torch.float32", expected, ["attention_mask", "input_ids"], "</s>"), family
