"""A grown vocabulary in a real engine: the same weights on any number of ranks, trained, saved and exported."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.whole import export
from ds_recipes.checkpoint.store import save_checkpoint
from ds_recipes.config.plan import make_plan
from ds_recipes.data.batch import one_document
from ds_recipes.data.tokenizer import add_tokens, check_special_ids, rows_for
from ds_recipes.engine.base import Engine
from ds_recipes.engine.checks import check_model
from ds_recipes.engine.create import create_engine
from ds_recipes.models.end_tokens import find_end_tokens
from ds_recipes.models.flops import count_flops
from ds_recipes.models.load import ModelSource
from ds_recipes.models.skeleton import tied_names
from ds_recipes.models.vocabulary import rows_needed
from ds_recipes.training.model_files import model_files
from ds_recipes.world.group import World
from tests.contract.engines import Case, settings
from tests.ranks.launch import run_ranks
from tests.unit.data.made import make_tokenizer
from tests.unit.models.tiny import CONFIGS, tiny_model

OLD_ROWS = 97
CPU = torch.device("cpu")
FAMILIES = ("llama", "llama_tied", "phi")
CASES = [(family, rows, new_rows) for family in FAMILIES for rows, new_rows in ((98, "mean"), (128, "random"))]
NEW_TOKENS = ("<|user|>", "<think>", "東京都")

Weights = dict[str, torch.Tensor]


def source_of(folder: Path) -> ModelSource:
    return ModelSource(AutoConfig.from_pretrained(folder), folder, 7, trust_remote_code=False)


def engine_of(source: ModelSource, world: World, tmp: Path) -> Engine:
    config = settings(Case(), tmp)
    engine = create_engine(config, make_plan(config, world.size), source, world)
    engine.load_shards(source.initial_weights(world.device))
    return engine


def weights_in_engines(world: World, cases: Sequence[tuple[str, int, str]], tmp: str) -> list[Weights]:
    """The gathered weights of each case (on rank 0 alone)."""
    seen = []
    for family, rows, new_rows in cases:
        engine = engine_of(source_of(Path(tmp) / family).resized(rows, new_rows), world, Path(tmp))
        weights = {name: tensor.clone() for name, tensor in engine.weights()}
        seen.append(weights if world.rank == 0 else {})
        engine.close()
    return seen


def read_whole(source: ModelSource) -> Weights:
    reader = source.initial_weights(CPU)
    tensors = {name: torch.empty(reader.shape(name)) for name in reader.names}
    for name, tensor in tensors.items():
        reader.read_into("fp32", name, 0, tensor.view(-1))
    return tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(folder / family, max_shard_size="9KB")
    return folder


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_weights_are_the_same_on_any_number_of_ranks(ranks: int, models: Path) -> None:
    first, *_ = run_ranks(weights_in_engines, ranks, CASES, str(models))
    for (family, rows, new_rows), weights in zip(CASES, first, strict=True):
        source = source_of(models / family)
        old, expected = read_whole(source), read_whole(source.resized(rows, new_rows))
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, expected[name]), (family, rows, new_rows, name)
            assert torch.equal(tensor[: len(old[name])], old[name]), (family, rows, new_rows, name)


def train_and_save(world: World, model: str, multiple: int, run: str) -> dict[str, Any]:
    """One step on a document of new tokens, then a checkpoint as the loop saves it; what was seen on the way."""
    tokenizer = copy.deepcopy(make_tokenizer())
    first = len(tokenizer)
    added_rows = slice(first, first + add_tokens(tokenizer, NEW_TOKENS))
    source = source_of(Path(model)).resized(rows_needed(rows_for(tokenizer), OLD_ROWS, multiple), "mean")
    check_special_ids(tokenizer, source.vocabulary_size)
    engine = engine_of(source, world, Path(run))
    check_model(engine, source, world, "fp32", 32, "Use --packing off.")
    before = {name: tensor.clone() for name, tensor in engine.weights()}
    ids = torch.tensor([tokenizer("".join(NEW_TOKENS) * 3).input_ids])
    for _ in range(12 // world.size):
        engine.backward(one_document(ids), scale=1 / (12 * ids.numel()))
    engine.update(lr=0.5)
    moved = {
        name: (tensor - before[name])[added_rows].abs().max().item()
        for name, tensor in engine.weights()
        if len(tensor) == source.vocabulary_size
    }
    skeleton = source.skeleton(torch.float32, "eager", CPU)
    probe_ids = torch.arange(source.vocabulary_size - 20, source.vocabulary_size)[None]
    logits = engine.logits(probe_ids)
    path = save_checkpoint(
        Path(run),
        1,
        engine,
        state={"identity": {}},
        files=model_files(source, skeleton, tokenizer, find_end_tokens(source.hf_config, source.folder, ())),
        probe=(probe_ids, logits),
        tied=tied_names(skeleton),
        world=world,
        save_optimizer=True,
        keep_last=None,
    )
    engine.close()
    flops = count_flops(skeleton).matmul_parameters
    return {"added": added_rows, "moved": moved, "path": path, "ids": probe_ids, "logits": logits, "flops": flops}


@pytest.mark.parametrize("family", ["llama_tied", "phi"])
def test_it_trains_and_exports_to_a_folder_for_plain_transformers(family: str, models: Path, tmp_path: Path) -> None:
    seen, _ = run_ranks(train_and_save, 2, str(models / family), 64, str(tmp_path))
    assert seen["added"] == slice(300, 303)
    assert len(seen["moved"]) == {"llama_tied": 1, "phi": 3}[family] and min(seen["moved"].values()) > 0
    exported = export(seen["path"], tmp_path / "hf", Wanted(dtype="float32"))
    assert exported.difference is not None and exported.difference < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    rows = 320  # 303 ids, padded to a multiple of 64
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == rows
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == rows
    assert len(tokenizer) == 303 <= rows
    assert tokenizer("".join(NEW_TOKENS)).input_ids == [0, 300, 301, 302]
    torch.testing.assert_close(model(seen["ids"]).logits, seen["logits"], rtol=1e-5, atol=1e-6)
    before = count_flops(source_of(models / family).skeleton(torch.float32, "eager", CPU)).matmul_parameters
    assert seen["flops"] - before == (rows - OLD_ROWS) * CONFIGS[family].hidden_size
    again = source_of(tmp_path / "hf")
    assert again.resized(rows_needed(rows_for(tokenizer), again.vocabulary_size, 64), "mean") is again
