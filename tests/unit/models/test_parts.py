"""A model of text and images, called with text alone: what plain transformers computes, documents apart, the rest frozen."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from ds_recipes.errors import InputError
from ds_recipes.models.load import find_model
from ds_recipes.models.parts import LANGUAGE, WHOLE, auto_class_of, part_saved
from ds_recipes.models.skeleton import build_skeleton
from ds_recipes.world.group import solo
from tests.unit.models import multimodal
from tests.unit.models.tiny import CONFIGS

CPU = torch.device("cpu")
VOCABULARY = 160
TOKENS = 8


def filled(model_type: str, folder: Path):
    """The structure that training builds, filled with the folder's weights."""
    source = find_model(solo(), str(folder), None, 5, False, part=LANGUAGE)
    source, notes = source.settled(allow_unused=False)
    assert notes == ()
    model = source.skeleton(torch.float32, "sdpa", CPU)
    weights = source.initial_weights(CPU)
    for name, parameter in list(model.named_parameters()):
        values = torch.empty(parameter.numel())
        weights.read_into("fp32", name, 0, values)
        owner, _, leaf = name.rpartition(".")
        kept = torch.nn.Parameter(values.reshape(parameter.shape), requires_grad=parameter.requires_grad)
        model.get_submodule(owner)._parameters[leaf] = kept
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("model_type", [name for name in multimodal.SETTINGS if name != "llama4"])
def test_text_gives_the_logits_of_plain_transformers_and_documents_do_not_see_each_other(
    tmp_path: Path, model_type: str
) -> None:
    multimodal.save(model_type, tmp_path, VOCABULARY)
    plain = AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = filled(model_type, tmp_path)
    first, other, second = (torch.randint(5, 140, (1, TOKENS)) for _ in range(3))
    one_by_one = torch.arange(TOKENS)[None]
    packed = torch.cat([one_by_one, one_by_one], dim=1)
    with torch.inference_mode():
        expected = plain(second).logits
        alone = model(input_ids=second, position_ids=one_by_one, use_cache=False).logits
        behind = [
            model(input_ids=torch.cat([before, second], 1), position_ids=packed, use_cache=False).logits[:, TOKENS:]
            for before in (first, other)
        ]
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(behind[0], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(*behind)


@pytest.mark.parametrize("model_type", multimodal.SETTINGS)
def test_the_language_model_and_its_head_are_all_that_is_trained(model_type: str) -> None:
    config = multimodal.config_of(model_type, VOCABULARY)
    model = build_skeleton(config, torch.float32, "sdpa", CPU, False, LANGUAGE)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert trained == {name for name in trained | frozen if "language_model." in name or name.startswith("lm_head.")}
    assert any("projector" in name or "visual" in name or "vision" in name for name in frozen)


@pytest.mark.parametrize("model_type", ["llava", "mistral3", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_type_without_a_class_of_text_alone_names_the_flag(tmp_path: Path, model_type: str) -> None:
    multimodal.save(model_type, tmp_path, VOCABULARY)
    with pytest.raises(InputError, match=f"type {model_type}.*--model_part language") as refused:
        find_model(solo(), str(tmp_path), None, 5, False).settled(allow_unused=False)
    assert len(str(refused.value)) < 600


def test_a_type_whose_class_of_text_would_drop_the_tower_names_the_flag(tmp_path: Path) -> None:
    multimodal.save("llama4", tmp_path, VOCABULARY)
    with pytest.raises(InputError, match=r"(?s)vision.*--model_part language"):
        find_model(solo(), str(tmp_path), None, 5, False).settled(allow_unused=False)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_model_of_text_alone_has_no_other_part(family: str) -> None:
    with pytest.raises(InputError, match=r"type \w+ have no other part. Leave it out"):
        auto_class_of(CONFIGS[family], LANGUAGE)


@pytest.mark.parametrize(
    "model_type, architecture, part",
    [
        ("llava", "LlavaForConditionalGeneration", LANGUAGE),
        ("llama4", "Llama4ForConditionalGeneration", LANGUAGE),
        ("llama4", "Llama4ForCausalLM", WHOLE),
        ("gemma3", "Gemma3ForConditionalGeneration", WHOLE),  # one class for both
        ("llama", "LlamaForCausalLM", WHOLE),
    ],
)
def test_an_export_builds_the_class_that_the_checkpoint_names(model_type: str, architecture: str, part: str) -> None:
    config = AutoConfig.for_model(model_type)
    config.architectures = [architecture]
    assert part_saved(config) == part
    config.architectures = None
    assert part_saved(config) == WHOLE
