"""Where generation stops: the model's own end tokens are kept, those that the data teach are added and told."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, LlamaConfig

from ds_recipes.errors import InputError
from ds_recipes.models.end_tokens import find_end_tokens
from tests.unit.data.made import make_tokenizer

EOS = make_tokenizer().eos_token_id  # 1


def model(folder: Path, eos: int | list[int] | None = None, **generation: Any) -> tuple[LlamaConfig, Path]:
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return LlamaConfig(eos_token_id=eos), folder


@pytest.mark.parametrize(
    "eos, generation, learned, written",
    [
        (1, {}, (1,), 1),
        (1, {}, (9,), [1, 9]),
        ([2, 7], {}, (1,), [2, 7, 1]),
        (1, {"eos_token_id": 9}, (1, 9), [9, 1]),
        (1, {"eos_token_id": [3, 4]}, (9, 3), [3, 4, 9]),
        (None, {}, (9,), 9),
        (2, {"temperature": 0.6}, (9,), [2, 9]),
        (1, {"eos_token_id": [1, 3]}, (), [1, 3]),
    ],
)
def test_what_is_learned_is_added_to_what_the_model_names(
    eos: Any, generation: dict[str, Any], learned: tuple[int, ...], written: int | list[int], tmp_path: Path
) -> None:
    """And whatever else the model's generation settings say stays; transformers reads the file."""
    ends = find_end_tokens(*model(tmp_path, eos, **generation), learned)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "generation_config.json").write_bytes(ends.generation_config())
    read = GenerationConfig.from_pretrained(tmp_path / "out")
    assert read.eos_token_id == written
    assert {**json.loads(ends.generation_config()), "eos_token_id": None} == {
        **ends.settings,
        **generation,
        "eos_token_id": None,
    }


def test_only_what_is_new_is_told(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    assert find_end_tokens(*model(tmp_path, [7, 1]), (EOS,)).note(tokenizer) is None
    other = tokenizer.convert_ids_to_tokens(9)
    note = find_end_tokens(*model(tmp_path, 1), (9, 1)).note(tokenizer)
    assert note is not None and f"end with {other} (id 9); the model's files know only </s> (id 1)" in note
    assert "eos_token stays </s>; --eos_token sets it" in note
    note = find_end_tokens(*model(tmp_path, [2, 7]), (1,)).note(tokenizer)
    assert note is not None and "end with </s> (id 1)" in note and "--eos_token" not in note


@pytest.mark.parametrize("content", ["[", "[]", '{"eos_token_id": "</s>"}'])
def test_settings_that_cannot_be_read_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match="cannot be read as generation settings"):
        find_end_tokens(LlamaConfig(), tmp_path, ())
