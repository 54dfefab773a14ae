"""Shapes from a config alone: equal to those of transformers' own models, family by family, and to published totals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ds_recipes.errors import InputError
from ds_recipes.planner.families import FAMILIES
from ds_recipes.planner.shapes import architecture_of
from tests.unit.planner.models import VARIANTS, small

EXAMPLES = Path(__file__).parents[3] / "examples" / "models"
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "mistral_7b": 7_241_732_096,
}


def real_sizes(config: PretrainedConfig) -> list[int]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sorted(parameter.numel() for parameter in model.parameters())


def planned_sizes(values: dict[str, Any]) -> list[int]:
    return sorted(parameter.numel for parameter in architecture_of(values, "a test").parameters)


@pytest.mark.parametrize("family, values", VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_sizes_are_those_of_transformers(family: str, values: dict[str, Any]) -> None:
    """From the few keys that a person writes, and from the whole config that transformers saves."""
    config = AutoConfig.for_model(family, **values)
    sizes = real_sizes(config)
    assert planned_sizes({"model_type": family, **values}) == sizes
    assert planned_sizes(json.loads(config.to_json_string(use_diff=False))) == sizes
    assert planned_sizes(json.loads(config.to_json_string())) == sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_fills_in(family: str) -> None:
    assert planned_sizes({"model_type": family}) == real_sizes(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_means_tied(family: str) -> None:
    for tied in (True, False):
        assert architecture_of({"model_type": family, **small(family, tie_word_embeddings=tied)}, "").tied == tied


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name: str) -> None:
    config = json.loads((EXAMPLES / f"{name}.json").read_text())
    assert architecture_of(config, name).numel == PUBLISHED[name]


def test_a_text_model_inside_another_is_found() -> None:
    inner = {"model_type": "gemma3_text", **small("gemma3_text")}
    outer = {"model_type": "gemma3", "text_config": inner, "vision_config": {"hidden_size": 7}}
    assert architecture_of(outer, "").numel == architecture_of(inner, "").numel


def test_a_larger_vocabulary_adds_rows_to_table_and_head() -> None:
    values = {"model_type": "llama", **small("llama")}
    before, after = architecture_of(values, ""), architecture_of(values, "", rows=128)
    assert after.numel - before.numel == 2 * (128 - 96) * 96


def test_an_unknown_family_is_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"x\.json: models of type 'mamba' are not known .*safetensors files"):
        architecture_of({"model_type": "mamba"}, "x.json")


@pytest.mark.parametrize("value", ["many", 0, -1, True, 1.5])
def test_a_size_that_is_none_is_refused_by_its_key(value: object) -> None:
    with pytest.raises(InputError, match="num_hidden_layers is"):
        architecture_of({"model_type": "llama", "num_hidden_layers": value}, "x.json")
