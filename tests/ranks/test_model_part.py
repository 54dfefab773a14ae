"""The language model of a model of text and images is trained alone; all else is in the export, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoTokenizer

from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.whole import export
from tests.nano import make_nano
from tests.ranks.training import Ended, train
from tests.unit.models import multimodal

EVERY_DAY = [("gemma3", "deepspeed", "bf16")]
SWEEP = [
    (model_type, engine, precision)
    for model_type in multimodal.SETTINGS
    for engine, precision in (("deepspeed", "fp32"), ("fsdp", "bf16"))
]


def make(folder: Path, model_type: str, precision: str) -> Path:
    """A run file, its data and tokenizer, and a model of text and images in the place of its model."""
    nano = make_nano(folder)
    model = folder / "model"
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (model / name).unlink()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    multimodal.save(model_type, model, len(AutoTokenizer.from_pretrained(model)) + 3, dtype)
    return nano


def start(nano: Path, ranks: int, *flags: str) -> Ended:
    folder = nano.parent
    fixed = ("--config", str(nano), "--save_checkpoint_path", str(folder / "run"), "--eval_interval", "0")
    return train(ranks, *fixed, "--lr_decay_style", "constant", *flags, outputs=folder / "outputs")


@pytest.mark.parametrize(
    "model_type, engine, precision",
    [*EVERY_DAY, *(pytest.param(*case, marks=pytest.mark.slow) for case in SWEEP)],
)
def test_the_rest_of_the_model_is_exported_as_it_was(
    tmp_path: Path, model_type: str, engine: str, precision: str
) -> None:
    nano = make(tmp_path, model_type, precision)
    flags = ("--engine", engine, "--precision", precision, "--model_part", "language", "--lr", "1e-2")
    packing = () if model_type in ("gemma3", "llava", "internvl", "mistral3", "qwen3_vl") else ("--packing", "off")
    ended = start(nano, 2, *flags, *packing, "--max_steps", "2", "--save_interval_iteration", "1")
    assert set(ended.statuses) == {0}, ended.text
    ended = start(nano, 2, *flags, *packing, "--max_steps", "3")
    assert set(ended.statuses) == {0} and "continuing from" in ended.text, ended.text
    exported = export(tmp_path / "run" / "iter_0000003", tmp_path / "out", Wanted())
    assert exported.difference is not None
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    rest = {name for name in before if any(word in name for word in ("vision", "visual", "projector"))}
    assert rest and not changed & rest, sorted(changed & rest)
    assert any(name.endswith("proj.weight") for name in changed)
    model, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["image_processor_type"] == model_type
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(model).__name__]


def test_without_the_flag_a_model_that_is_more_than_text_names_it(tmp_path: Path) -> None:
    ended = start(make(tmp_path, "llava", "fp32"), 1, "--max_steps", "1")
    assert ended.statuses == (2,) and "with --model_part language" in ended.text, ended.text
    assert "LlamaConfig" not in ended.text, "transformers' list of classes"
