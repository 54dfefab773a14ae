"""Models whose saved state has buffers: they train as plain transformers does, and a checkpoint gives everything back."""

import copy
import json
import re
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from ds_recipes.checkpoint.contents import capture
from ds_recipes.checkpoint.load import find_newest, open_reader
from ds_recipes.checkpoint.native.write import NativePart
from ds_recipes.checkpoint.rank_file import Streamed, own_ranges
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.checkpoint.store import Store
from ds_recipes.config.plan import make_plan
from ds_recipes.data.batch import MicroBatch
from ds_recipes.engine.base import Engine
from ds_recipes.engine.create import create_engine
from ds_recipes.errors import TrainingError
from ds_recipes.models.load import ModelSource
from ds_recipes.models.skeleton import saved_buffers
from ds_recipes.world.group import World
from tests.contract.engines import ENGINES, ROWS, Case, settings, traced
from tests.contract.oracle import Oracle, global_batch, joined, llama, norm_of
from tests.ranks.launch import run_ranks
from tests.unit.models.tiny import WITH_BUFFERS, tiny_model

DAILY = ("deepseek_v3", "minimax_m2", "gemma4_text")
STAGES = {"zero3": ("deepspeed", 3), "zero2": ("deepspeed", 2), "fsdp": ("fsdp", 3)}


def rows_of(step: int, vocabulary: int) -> list[MicroBatch]:
    """A global batch of rows of one document each: convolutions and recurrent layers look past a border."""
    return [
        replace(
            row,
            input_ids=row.input_ids % vocabulary,
            target_ids=row.target_ids % vocabulary,
            position_ids=torch.arange(row.input_ids.shape[1])[None],
        )
        for row in global_batch(step, ROWS)
    ]


def train(engine: Engine, world: World, step: int, vocabulary: int) -> dict[str, float]:
    rows = rows_of(step, vocabulary)
    targets = sum(row.num_target_tokens for row in rows)
    mine = rows[world.rank :: world.size]
    half = len(mine) // 2
    losses = [float(engine.backward(joined(part), 1 / targets)) for part in (mine[:half], mine[half:])]
    result = engine.update(0.01)
    return {"loss": world.sum([sum(losses)])[0] / targets, "norm": result.grad_norm}


def built(world: World, source: ModelSource, case: Case, stage: int, tmp: str, further: str = "{}") -> Engine:
    ds = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}} | json.loads(further)
    case = replace(case, rows_per_rank=ROWS // world.size // 2, ds=json.dumps(ds))
    config = settings(case, Path(tmp))
    return create_engine(config, make_plan(config, world.size), source, world)


def train_save_and_go_on(
    world: World, source: ModelSource, case: Case, stage: int, tmp: str, native: bool = False
) -> dict[str, Any]:
    """Two steps, a checkpoint, one more; and that one more again from the checkpoint, in a new engine.

    `native`: the checkpoint is in DeepSpeed's own format.
    """
    vocabulary = source.vocabulary_size
    engine = built(world, source, case, stage, tmp)
    engine.load_shards(source.initial_weights(world.device))
    loaded = engine.saved_buffers()
    steps = [train(engine, world, step, vocabulary) for step in range(2)]
    probe = torch.arange(8)[None] % vocabulary
    logits = engine.logits(probe)
    saved = engine.saved_buffers()
    run = Path(tmp) / f"run-{world.broadcast(id(engine))}"
    contents = capture(engine, 2, {"step": 2, "identity": {}}, {}, (probe, logits), {})
    ranges = own_ranges(engine.shards(), world, save_optimizer=True)
    part = NativePart(engine, world, 2) if native else Streamed(engine, ranges)
    Store(run, world, "test", Keep(None)).publish(contents, part)
    steps.append(train(engine, world, 2, vocabulary))
    engine.close()
    found = find_newest(run, world)
    assert found is not None
    engine = built(world, source, case, stage, tmp)
    engine.load_shards(open_reader(found.path, found.manifest))
    resumed = engine.saved_buffers()
    again = train(engine, world, 2, vocabulary)
    engine.close()
    version = json.loads((found.path / "manifest.json").read_text())["version"]
    seen = {"loaded": loaded, "steps": steps, "saved": saved, "resumed": resumed, "again": again, "version": version}
    return seen | {"path": str(found.path)}


def many(world: World, folders: dict[str, str], precision: str, where: str, tmp: str) -> dict[str, Any]:
    engine, stage = STAGES[where]
    case = Case(engine=engine, precision=precision, optimizer="adamw")
    reports = {}
    for family, folder in folders.items():
        source = ModelSource(copy.deepcopy(WITH_BUFFERS[family]), Path(folder), 7, False)
        reports[family] = traced(train_save_and_go_on, world, source, case, stage, tmp, where == "zero2")
    return reports


@cache
def folders() -> tuple[tempfile.TemporaryDirectory[str], dict[str, PreTrainedModel]]:
    tmp = tempfile.TemporaryDirectory()
    models = {family: tiny_model(family) for family in WITH_BUFFERS}
    for family, model in models.items():
        model.save_pretrained(Path(tmp.name) / family)
    return tmp, models


@cache
def seen(families: tuple[str, ...], precision: str, where: str) -> dict[str, Any]:
    tmp, _ = folders()
    chosen = {family: str(Path(tmp.name) / family) for family in families}
    first, second = run_ranks(many, 2, chosen, precision, where, tmp.name, timeout=400)
    for family in families:
        assert "error" not in first[family], first[family]["error"]
        for name, buffer in first[family]["saved"].items():
            assert torch.equal(buffer, second[family]["saved"][name]), name
    return first


def families(where: str) -> list[Any]:
    """Some on each engine every day, the others in the longer sweep."""
    return [
        pytest.param(family, where, marks=[] if family in DAILY and where != "zero2" else [pytest.mark.slow])
        for family in WITH_BUFFERS
    ]


EVERYWHERE = [case for where in STAGES for case in families(where)]


def asked(family: str) -> tuple[str, ...]:
    return DAILY if family in DAILY else tuple(name for name in WITH_BUFFERS if name not in DAILY)


@pytest.mark.parametrize("family, where", EVERYWHERE)
def test_loss_and_gradient_are_those_of_plain_transformers(family: str, where: str) -> None:
    report = seen(asked(family), "fp32", where)[family]
    model = folders()[1][family]
    oracle = Oracle(copy.deepcopy(model.config), model.state_dict(), "sgd")
    rows = rows_of(0, model.config.vocab_size)
    loss, gradients = oracle.gradients(rows)
    assert report["steps"][0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert report["steps"][0]["norm"] == pytest.approx(norm_of(gradients), rel=1e-5)
    if family not in ("minimax", "deepseek_v4"):  # what they have follows from the config, or chooses experts alone
        plain = Oracle(copy.deepcopy(model.config), dict(model.named_parameters()), "sgd")
        assert norm_of(plain.gradients(rows)[1]) != pytest.approx(norm_of(gradients), rel=1e-4), "they do not matter"


@pytest.mark.parametrize("family, where", EVERYWHERE)
def test_a_checkpoint_gives_them_back(family: str, where: str) -> None:
    report = seen(asked(family), "fp32", where)[family]
    theirs = saved_buffers(folders()[1][family])
    assert report["saved"].keys() == theirs.keys() and report["version"] == 2
    for name, buffer in theirs.items():
        assert all(torch.equal(report[when][name], buffer) for when in ("loaded", "saved", "resumed")), name
    assert report["again"] == report["steps"][2]


def on_other_ranks(world: World, folder: str, family: str, path: str, tmp: str) -> dict[str, Any]:
    source = ModelSource(copy.deepcopy(WITH_BUFFERS[family]), Path(folder), 7, False)
    engine = built(world, source, Case(engine="fsdp", optimizer="adamw"), 3, tmp)
    found = find_newest(Path(path), world)
    assert found is not None
    engine.load_shards(open_reader(found.path, found.manifest))
    step = train(engine, world, 2, source.vocabulary_size)
    return {"buffers": engine.saved_buffers(), "step": step}


@pytest.mark.slow
def test_three_ranks_of_the_other_engine_go_on() -> None:
    report = seen(DAILY, "fp32", "zero3")["deepseek_v3"]
    folder = Path(folders()[0].name) / "deepseek_v3"
    other = run_ranks(on_other_ranks, 3, str(folder), "deepseek_v3", report["path"], folders()[0].name)[0]
    assert all(torch.equal(buffer, report["saved"][name]) for name, buffer in other["buffers"].items())
    assert other["step"]["loss"] == pytest.approx(report["again"]["loss"], rel=1e-5)


@dataclass(frozen=True)
class Changing(ModelSource):
    """A Llama model each of whose blocks subtracts a running mean, and counts."""

    kind: str = "running"

    def skeleton(self, dtype: torch.dtype, attn_implementation: str, device: torch.device) -> PreTrainedModel:
        return changing(super().skeleton(dtype, attn_implementation, device), self.kind)


class RunningMean(nn.Module):
    """Subtracts the mean of the rows that came before, and updates it in training as a batch norm does."""

    def __init__(self, mlp: nn.Module, width: int, kind: str) -> None:
        super().__init__()
        self.mlp, self.kind, self.calls = mlp, kind, 0
        with torch.device("cpu"):
            self.register_buffer("mean", torch.full((width,), 0.05, dtype=torch.float32))
            self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))
            self.register_buffer("of_the_forward", torch.zeros(width), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mlp(hidden) - self.mean
        if self.kind == "always" or self.training:
            self.calls += 1
            self.mean = torch.lerp(self.mean, out.detach().float().mean((0, 1)), 0.1)  # replaced, not written to
            counted = int(hidden.flatten()[0] > 0) if self.kind == "counts tokens" else 1
            if self.kind != "late" or self.calls > 2:
                self.num_batches += counted
        return out


def changing(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.mlp = RunningMean(layer.mlp, model.config.hidden_size, kind)
    return model


def evaluated(world: World, source: ModelSource, case: Case, tmp: str) -> dict[str, Any]:
    """A step, an evaluation, and a step that is skipped, each with the buffers after it."""
    engine = built(world, source, case, 3, tmp)
    engine.load_shards(source.initial_weights(world.device))
    before = engine.saved_buffers()
    weights = {name: tensor.clone() for name, tensor in engine.weights()}
    try:
        train(engine, world, 0, 331)
        after = engine.saved_buffers()
        engine.evaluate(joined(rows_of(5, 331)[:2]))
        evaluated = engine.saved_buffers()
        train(engine, world, 1, 331)
    except TrainingError as error:
        return {"refused": str(error)}
    kept = engine.saved_buffers()
    rows = rows_of(2, 331)
    for part in (rows[world.rank : 6 : world.size], rows[6 + world.rank :: world.size]):
        engine.backward(joined(part), float("inf"))
    applied = engine.update(0.01).applied
    skipped = engine.saved_buffers()
    engine.close()
    return {
        "weights": weights, "before": before, "after": after, "evaluated": evaluated, "kept": kept, "skipped": skipped,
        "applied": applied,
    }  # fmt: skip


def changes(world: World, engine: str, tmp: str) -> dict[str, Any]:
    case = Case(engine=engine, optimizer="adamw")
    source = Changing(llama(False), None, 7, False)
    return {
        "resumed": traced(train_save_and_go_on, world, source, case, 3, tmp),
        "recomputed": traced(
            train_save_and_go_on, world, source, replace(case, checkpointing=True), 3, tmp, engine == "deepspeed"
        ),
        "evaluated": traced(evaluated, world, replace(source, kind="always"), case, tmp),
        "counts tokens": traced(evaluated, world, replace(source, kind="counts tokens"), case, tmp),
        "late": traced(evaluated, world, replace(source, kind="late"), case, tmp),
    }


@cache
def seen_changes(engine: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as tmp:
        reports: list[dict[str, Any]] = run_ranks(changes, 2, engine, tmp, timeout=300)
    for report in reports:
        for seen in report.values():
            assert "error" not in seen, seen["error"]
    return reports


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_forward_changes_is_the_mean_over_ranks(engine: str) -> None:
    """Against one plain model a rank, which sees that rank's rows."""
    reports = [report["evaluated"] for report in seen_changes(engine)]
    means = []
    for rank in range(2):
        oracle = Oracle(llama(False), {}, "sgd")
        changing(oracle.model, "running").load_state_dict(reports[0]["weights"] | reports[0]["before"])
        mine = rows_of(0, 331)[rank::2]
        for part in (mine[:3], mine[3:]):
            rows = joined(part)
            oracle.model(input_ids=rows.input_ids, use_cache=False)
        means.append(saved_buffers(oracle.model))
    for name, found in reports[0]["after"].items():
        assert torch.equal(found, reports[1]["after"][name]), "the ranks differ"
        assert not torch.equal(found, reports[0]["before"][name]), "it did not change"
        expected = (means[0][name].double() + means[1][name].double()) / 2
        assert torch.allclose(found.double(), expected, atol=1e-6), name


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_has_what_forwards_have_changed(engine: str) -> None:
    report = seen_changes(engine)[0]["resumed"]
    for name, buffer in report["saved"].items():
        assert not torch.equal(buffer, report["loaded"][name]) and torch.equal(buffer, report["resumed"][name]), name
    assert report["again"] == report["steps"][2]


@pytest.mark.parametrize("engine", ENGINES)
def test_so_does_one_with_checkpointing_also_from_deepspeeds_own_format(engine: str) -> None:
    report = seen_changes(engine)[0]["recomputed"]
    assert all(torch.equal(buffer, report["resumed"][name]) for name, buffer in report["saved"].items())
    assert report["again"] == report["steps"][2]


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_that_run_again_change_nothing_twice(engine: str) -> None:
    kept, recomputed = (seen_changes(engine)[0][name] for name in ("resumed", "recomputed"))
    for step, other in zip(kept["steps"], recomputed["steps"], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert step["norm"] == pytest.approx(other["norm"], rel=1e-5)
    for name, buffer in kept["saved"].items():
        assert torch.allclose(buffer.double(), recomputed["saved"][name].double(), rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("engine", ENGINES)
def test_neither_an_evaluation_nor_a_skipped_step_leaves_a_trace(engine: str) -> None:
    report = seen_changes(engine)[0]["evaluated"]
    assert not report["applied"]
    for name in report["after"]:
        assert torch.equal(report["after"][name], report["evaluated"][name]), name
        assert torch.equal(report["kept"][name], report["skipped"][name]), name


@pytest.mark.parametrize("engine", ENGINES)
def test_what_cannot_be_kept_equal_is_refused_by_name(engine: str) -> None:
    for report in seen_changes(engine):
        assert re.search(r"layers\.\d\.mlp\.num_batches of whole numbers", report["counts tokens"]["refused"])
        assert "changed the buffer model.layers.0.mlp.num_batches, which it left alone" in report["late"]["refused"]
