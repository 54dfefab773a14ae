"""A run has the tokens of tokenizer.json, whatever class transformers would rebuild the tokenizer as, and so have its exports."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config, Qwen2Tokenizer

from ds_recipes.config.load import load_config
from ds_recipes.data.tokenizer import load_tokenizer
from ds_recipes.data.tokenizer_file import bos_note, loading_note
from ds_recipes.errors import InputError
from ds_recipes.models.end_tokens import find_end_tokens
from ds_recipes.training.inputs import read_model
from ds_recipes.training.model_files import model_files
from ds_recipes.world.group import solo
from tests.unit.data.kinds import LOSSY, PREFIXED, UNPREFIXED

TEXTS = [
    "The quick  fox\n\tis here, says 12345.", " 1234567 89", "été 日本語 ｶﾅ ①", "don't I'LL", "a</s>b <s> c</s>", "x  \n\n y",
    "🙂 ok", "a1b22",
]  # fmt: skip
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

REBUILT = [
    ("llama 3", "Qwen2TokenizerFast"),
    ("llama 3", "Qwen2Tokenizer"),
    ("gpt 2", "GPTNeoXTokenizerFast"),
    ("llama 3", "CohereTokenizerFast"),
    ("llama 2", "LlamaTokenizerFast"),
    ("llama 2", "CodeLlamaTokenizerFast"),
    ("phi 3", "LlamaTokenizer"),
    ("llama 3", "GPT2TokenizerFast"),  # OLMo's
    ("unigram", "LlamaTokenizerFast"),
    ("t5", "T5TokenizerFast"),
    ("xlm-r", "XLMRobertaTokenizerFast"),
    ("unigram", "AlbertTokenizerFast"),  # cannot be loaded at all by its class
    ("byte level with add_prefix_space", "GPT2TokenizerFast"),
]
"""Tokenizers that transformers 5 gives other tokens by this class than their file does."""

KEPT = [
    ("gpt 2", "GPT2TokenizerFast"),
    ("gemma", "GemmaTokenizerFast"),
    ("llama 2, not legacy", "LlamaTokenizerFast"),
    ("llama 3", "PreTrainedTokenizerFast"),
    ("llama 3", None),
]


def write(folder: Path, kind: str, tokenizer_class: str | None, **settings: Any) -> Tokenizer:
    """A tokenizer's folder, and its tokenizer.json as `tokenizers` reads it."""
    folder.mkdir(exist_ok=True)
    (PREFIXED | UNPREFIXED | LOSSY)[kind]().save(str(folder / "tokenizer.json"))
    named = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES | named | settings))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def same(tokenizer: Any, backend: Tokenizer) -> bool:
    return all(tokenizer(text).input_ids == backend.encode(text).ids for text in TEXTS)


@pytest.mark.parametrize("kind, tokenizer_class", REBUILT)
def test_the_tokens_are_those_of_the_file_and_the_user_is_told(tmp_path: Path, kind: str, tokenizer_class: str) -> None:
    backend = write(tmp_path, kind, tokenizer_class)
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    assert same(tokenizer, backend)
    note = loading_note(tokenizer)
    assert note is not None and note.startswith(f"tokenizer {tmp_path} is read from its tokenizer.json as it is: ")
    if tokenizer_class != "AlbertTokenizerFast":
        assert (
            f"rebuilds it as {tokenizer_class.removesuffix('Fast')}: it reads " in note
            and ", tokenizer.json as " in note
        )
        assert not same(AutoTokenizer.from_pretrained(tmp_path), backend), "else this case shows nothing"


@pytest.mark.parametrize("kind, tokenizer_class", KEPT)
def test_a_class_that_keeps_to_the_file_stays(tmp_path: Path, kind: str, tokenizer_class: str | None) -> None:
    backend = write(tmp_path, kind, tokenizer_class)
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    assert same(tokenizer, backend) and loading_note(tokenizer) is None
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("kind, tokenizer_class", [("gpt 2", "GPT2TokenizerFast"), ("llama 3", "Qwen2TokenizerFast")])
@pytest.mark.parametrize("adds", [True, False])
def test_a_setting_of_bos_that_transformers_does_not_heed_is_told(
    tmp_path: Path, kind: str, tokenizer_class: str, adds: bool
) -> None:
    """These files' post-processors add it."""
    backend = write(tmp_path, kind, tokenizer_class, add_bos_token=adds, add_eos_token=False)
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    assert same(tokenizer, backend)
    note = bos_note(tokenizer)
    assert (note is None) == adds
    if note is not None:
        assert (
            "has add_bos_token false, but transformers goes by the post-processor of tokenizer.json, which adds BOS"
            in note
        )


def test_what_the_tokenizers_own_settings_demand_is_no_difference(tmp_path: Path) -> None:
    token = {
        "content": "<call>",
        "special": False,
        "normalized": False,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
    }
    backend = write(tmp_path, "gpt 2", "GPT2TokenizerFast", add_prefix_space=True, added_tokens_decoder={"9000": token})
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    assert loading_note(tokenizer) is None
    assert tokenizer.tokenize("a<call>fox") == ["Ġa", "<call>", "Ġfox"]
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True)])
    assert tokenizer("the fox").input_ids == backend.encode("the fox").ids


def read(tmp_path: Path, model: Any, tokenizer: Path) -> Any:
    """What train.py reads before it builds an engine, from a run with this model's config and tokenizer."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(model.to_dict()))
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"text": "the fox is here"}) + "\n")
    flags = {
        "model_config": config,
        "tokenizer_name": tokenizer,
        "train_data": data,
        "save_checkpoint_path": tmp_path / "run",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    settings = [*words, "--dataset", "text", "--context_size", "64", "--max_steps", "1", "--batch_size_training", "1"]
    return read_model(load_config(settings, env={}), solo(), None)


SIZES: Any = {
    "vocab_size": 2000, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind, tokenizer_class", REBUILT)
def test_what_a_run_saves_is_loaded_with_the_same_tokens(tmp_path: Path, kind: str, tokenizer_class: str) -> None:
    backend = write(tmp_path / "tokenizer", kind, tokenizer_class)
    inputs = read(tmp_path, LlamaConfig(**SIZES), tmp_path / "tokenizer")
    assert any("read from its tokenizer.json as it is" in note for note in inputs.notes)
    saved = tmp_path / "saved"
    saved.mkdir()
    ends = find_end_tokens(inputs.source.hf_config, inputs.source.folder, ())
    for name, content in model_files(inputs.source, inputs.skeleton, inputs.tokenizer, ends).items():
        (saved / name).write_bytes(content)
    assert same(AutoTokenizer.from_pretrained(saved), backend)
    again = load_tokenizer(str(saved), trust_remote_code=False)
    assert same(again, backend) and loading_note(again) is None


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "PreTrainedTokenizerFast", "Qwen2TokenizerFast"])
def test_a_model_that_transformers_gives_another_tokenizer_is_refused_and_the_remedy_works(
    tmp_path: Path, tokenizer_class: str
) -> None:
    """A Qwen 2 with a tokenizer of another make, as DeepSeek's distilled models have it."""
    write(tmp_path / "tokenizer", "llama 3", tokenizer_class)
    with pytest.raises(InputError) as refused:
        read(tmp_path, Qwen2Config(**SIZES), tmp_path / "tokenizer")
    message = str(refused.value)
    assert "loads the tokenizer of such a model as Qwen2Tokenizer, whatever its files say: it reads 'In 2024" in message
    assert "from transformers import Qwen2Tokenizer as T" in message and "--tokenizer_name tokenizer-rebuilt" in message
    rebuilt = tmp_path / "tokenizer-rebuilt"
    Qwen2Tokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(rebuilt)
    inputs = read(tmp_path, Qwen2Config(**SIZES), rebuilt)
    assert same(inputs.tokenizer, Qwen2Tokenizer.from_pretrained(rebuilt).backend_tokenizer)
