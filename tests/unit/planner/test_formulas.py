"""What the planner repeats of other parts, because they need torch, is equal to them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_recipes.checkpoint import space
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.checkpoint.space import Size
from ds_recipes.config.load import load_config
from ds_recipes.engine.activations.blocks import segment_numbers
from ds_recipes.models.flops import count_flops
from ds_recipes.models.vocabulary import rows_needed
from ds_recipes.planner import storage
from ds_recipes.planner.architecture import Parameter
from ds_recipes.planner.command import STAND_INS
from ds_recipes.planner.families import FAMILIES
from ds_recipes.planner.find import find_architecture
from ds_recipes.planner.memory import rows_shard
from ds_recipes.planner.shapes import architecture_of
from ds_recipes.planner.situation import situation_of
from ds_recipes.planner.work import flops_per_token
from ds_recipes.ranges import COPY_BYTES
from tests.unit.planner.models import small

MODEL = str(Path(__file__).parents[3] / "examples" / "models" / "llama2_7b.json")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_of_the_meter(family: str, tied: bool) -> None:
    values: dict[str, Any] = small(family, tie_word_embeddings=tied)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    planned = flops_per_token(architecture_of({"model_type": family, **values}, family), 512)
    assert planned == pytest.approx(count_flops(skeleton).per_token(512), rel=1e-9)


@pytest.mark.parametrize("kinds, ranks", [(1, 1), (3, 8), (3, 64)])
def test_a_checkpoint_is_as_large_as_the_check_before_a_run_says(kinds: int, ranks: int) -> None:
    shapes = {"a": (32_000, 4096), "b": (4096,), "c": (11_008, 4096)}
    numel = 32_000 * 4096 + 4096 + 11_008 * 4096
    size = Size(shapes=shapes, kinds=kinds, ranks=ranks, small_bytes=0)
    assert storage.checkpoint_bytes(numel, len(shapes), kinds, ranks) == size.num_bytes


@pytest.mark.parametrize("last, every, best", [(None, None, None), (2, None, None), (3, 200, None), (2, 300, 2)])
@pytest.mark.parametrize("interval", [0, 100, 150])
@pytest.mark.parametrize("steps", [90, 1000, 1050])
def test_as_many_are_kept_as_the_check_before_a_run_says(
    last: int | None, every: int | None, best: int | None, interval: int, steps: int
) -> None:
    flags = ["--model_config", MODEL, "--save_interval_iteration", str(interval)]
    flags += [
        word for name, value in (("last", last), ("every", every)) if value for word in (f"--keep_{name}", str(value))
    ]
    if best:
        flags += ["--keep_best", str(best), "--validation_data", "data.jsonl"]
    config = load_config(flags, stand_ins=STAND_INS)
    expected = space.kept_at_once(Keep(last, every, best), space.Plan(0, steps, interval), [])
    assert storage.kept_at_once(config, steps) == expected


@pytest.mark.parametrize("number", [1, 3, 32, 40])
def test_blocks_are_cut_into_the_engines_segments(number: int, tmp_path: Path) -> None:
    ds = tmp_path / "ds.json"
    sections = {"zero_optimization": {"stage": 3}, "activation_checkpointing": {"number_checkpoints": number}}
    ds.write_text(json.dumps(sections))
    flags = ["--model_config", MODEL, "--ds_config", str(ds), "--activation_checkpointing"]
    config = load_config(flags, stand_ins=STAND_INS)
    situation, _ = situation_of(config, 1, 8)
    model = find_architecture(config).model
    assert list(situation.segments(model) or ()) == segment_numbers(len(model.blocks), number)


def test_constants_of_files() -> None:
    same = ("BYTES_A_TENSOR", "BYTES_A_RANK", "BLOCK_BYTES")
    assert [getattr(storage, name) for name in same] == [getattr(space, name) for name in same]
    assert storage.READ_BYTES == COPY_BYTES


@pytest.mark.parametrize("multiple", [None, 64, 1000])
def test_rows_of_a_padded_vocabulary(multiple: int | None) -> None:
    padding = ["--pad_vocabulary_to", str(multiple)] if multiple else []
    tokens = ["--added_tokens", "<a>", "--added_plain_tokens", "<b>"]
    config = load_config(["--model_config", MODEL, *tokens, *padding], stand_ins=STAND_INS)
    assert find_architecture(config).model.vocabulary_size == rows_needed(32_002, 32_000, multiple)


def test_a_host_holds_what_all_its_ranks_offload(tmp_path: Path) -> None:
    """Eight ranks on one host or on two: together they keep the same, and a host its ranks' part of it."""
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    config = load_config(["--model_config", MODEL, "--ds_config", str(ds)], stand_ins=STAND_INS)
    model = find_architecture(config).model
    one, two = (storage.host_memory(model, situation_of(config, nodes, 8 // nodes)[0], config) for nodes in (1, 2))
    assert one.offloaded == 2 * two.offloaded
    # Masters, two moments and gradients in float32.
    assert one.offloaded == pytest.approx(16 * model.numel, rel=1e-3)


@pytest.mark.parametrize(("rows", "ranks", "held"), [(5, 2, 9), (4, 2, 6), (1, 8, 3), (7, 3, 9)])
def test_the_largest_slice_of_uneven_rows_counts(rows: int, ranks: int, held: int) -> None:
    assert rows_shard(Parameter("a.weight", (rows, 3)), ranks) == held
