"""What a model's files hold is settled before any data is read, and a run that continues needs them no more."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.whole import export
from tests.nano import make_model, make_nano
from tests.ranks.training import Ended, metrics, train

Tensors = dict[str, torch.Tensor]


def start(nano: Path, *flags: str, ranks: int = 1) -> Ended:
    folder = nano.parent
    fixed = (
        "--config",
        str(nano),
        "--save_checkpoint_path",
        str(folder / "run"),
        "--data_cache",
        str(folder / "cache"),
    )
    return train(ranks, *fixed, "--eval_interval", "0", *flags, outputs=folder / "outputs")


def rewrite(nano: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = nano.parent / "model" / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_unused_weights_are_refused_before_any_data_is_read_and_left_out_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    nano = make_nano(tmp_path)
    rewrite(nano, lambda tensors: tensors | {"vision_tower.proj.weight": torch.ones(4, 4)})
    ended = start(nano, "--max_steps", "1")
    assert ended.statuses == (2,), ended.text
    assert "vision_tower.proj.weight" in ended.text and "--allow_unused_weights" in ended.text
    assert not list((tmp_path / "cache").glob("**/*")), "tokenised before the refusal"
    ended = start(nano, "--max_steps", "1", "--allow_unused_weights")
    assert ended.statuses == (0,), ended.text
    assert ended.text.count("1 tensors of the files are not part of the model") == 1


@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_head_of_its_own_is_trained_saved_continued_and_exported(tmp_path: Path, engine: str) -> None:
    nano = make_nano(tmp_path, tied=True)
    embedding = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    head = embedding + 0.1 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    rewrite(nano, lambda tensors: tensors | {"lm_head.weight": head})
    flags = (
        "--engine",
        engine,
        "--lr",
        "0",
        "--lr_decay_style",
        "constant",
        "--weight_decay",
        "0",
        "--save_interval_iteration",
        "1",
    )
    ended = start(nano, *flags, "--max_steps", "1")
    assert ended.statuses == (0,) and "trained apart" in ended.text, ended.text
    (tmp_path / "model" / "model.safetensors").unlink()
    ended = start(nano, *flags, "--max_steps", "2")
    assert ended.statuses == (0,) and sorted(metrics(tmp_path / "run")) == [1, 2], ended.text
    export(tmp_path / "run" / "iter_0000002", tmp_path / "out", Wanted(dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, head) and torch.equal(model.model.embed_tokens.weight, embedding)


def test_a_checkpoint_of_another_model_is_refused_before_any_data_is_read(tmp_path: Path) -> None:
    nano = make_nano(tmp_path)
    assert start(nano, "--max_steps", "1", "--save_interval_iteration", "1").statuses == (0,)
    tokens = set((tmp_path / "cache").glob("*"))
    other = tmp_path / "train.jsonl"
    other.write_text(other.read_text() + other.read_text())
    make_model(tmp_path / "model", tied=False, hidden_size=24)
    ended = start(nano, "--max_steps", "2")
    assert ended.statuses == (2,) and "holds another model than this run's" in ended.text, ended.text
    assert set((tmp_path / "cache").glob("*")) == tokens
