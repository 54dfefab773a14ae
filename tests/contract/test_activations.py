"""Activation checkpointing under both engines: the same gradients bit for bit, however many blocks are computed again."""

import copy
import functools
import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ds_recipes.config.engine_settings import Checkpointing
from ds_recipes.config.plan import make_plan
from ds_recipes.engine.activations import ActivationRecord, install_checkpointing
from ds_recipes.engine.create import create_engine
from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World
from tests.contract.engines import Case, settings
from tests.contract.oracle import CONTEXT, global_batch, joined, llama
from tests.ranks.launch import run_ranks

MLP_SHAPES = {(97, 60), (60, 97)}
BLOCKS = 5
RANKS = 2


@dataclass(frozen=True)
class Variant:
    """A model and what is kept of it."""

    checkpoints: int | None = 0  # 0: no checkpointing
    tied: bool = False
    frozen: bool = False
    precision: str = "fp32"
    stage: int = 3
    contiguous: bool = False


MODELS = {
    "plain": Variant(),
    "tied": Variant(tied=True),
    "frozen": Variant(frozen=True),
    "bf16": Variant(precision="bf16"),
    "stage 2": Variant(stage=2),
}
CHECKPOINTS = {"plain": (1, 2, 3, None), "tied": (2,), "frozen": (1,), "bf16": (3,), "stage 2": (2,)}
PROBED = Variant(checkpoints=1)


class Source(ModelSource):
    """A model with checkpointing put in before any engine sees it."""

    def __init__(self, variant: Variant) -> None:
        config = copy.deepcopy(llama(variant.tied))
        config.num_hidden_layers = BLOCKS
        config.attention_dropout = 0.1
        super().__init__(config, None, 7, False)
        self.variant = variant
        self.records: list[tuple[PreTrainedModel, ActivationRecord]] = []

    def skeleton(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        model = super().skeleton(*args, **kwargs)
        if self.variant.frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("o_proj" in name or "norm" in name)
        if self.variant.checkpoints != 0:
            asked = Checkpointing(self.variant.checkpoints, False, self.variant.contiguous, False, True)
            self.records.append((model, install_checkpointing(model, asked, "cpu")))
        return model


def train(world: World, engine_name: str, variant: Variant, tmp: Path) -> dict[str, Any]:
    """Two steps of two micro-steps each with dropout, an evaluation between; what came of it."""
    torch.manual_seed(world.rank)
    zero = {"stage": variant.stage, "stage3_param_persistence_threshold": 0}
    if variant == PROBED:  # release at once what is gathered
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    ds = json.dumps({"zero_optimization": zero})
    case = Case(precision=variant.precision, rows_per_rank=3, engine=engine_name, ds=ds)
    config = settings(case, tmp)
    source = Source(variant)
    engine: Any = create_engine(config, make_plan(config, world.size), source, world)
    engine.load_shards(source.initial_weights(world.device))
    record = next((record for model, record in source.records if model is engine.model), None)
    probed = record if variant == PROBED else None
    seen = [] if probed is None else probe_recomputations(probed, lambda: gathered(engine.model))
    losses = []
    for step in range(2):
        rows = global_batch(step, 12)
        for micro in range(2):
            first = (micro * world.size + world.rank) * 3
            losses.append(float(engine.backward(joined(rows[first : first + 3]), 1 / 50)))
        losses.append(engine.update(0.05).grad_norm)
        losses.append(float(engine.evaluate(joined(global_batch(90 + step, 2)))[0]))
    weights = [tensor.clone() for _, tensor in engine.weights()]
    taken = record.take() if record is not None else {}
    engine.close()
    return {"losses": losses, "weights": weights, "taken": taken, "gathered": seen}


def probe_recomputations(record: ActivationRecord, probe: Callable[[], Any]) -> list[tuple[Any, Any]]:
    """What `probe` says before and after each segment's recomputation, as a list that fills."""
    plain, seen = record._around_recompute, []

    @contextmanager
    def around() -> Iterator[None]:
        before = probe()
        try:
            with plain():
                yield
        finally:  # it may end early
            seen.append((before, probe()))

    record._around_recompute = around  # type: ignore[method-assign]
    return seen


def gathered(model: nn.Module) -> list[int]:
    """Which blocks are gathered, as FSDP2 says; under ZeRO-3 how many tensors have the shape of a whole MLP matrix."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        blocks = model.get_submodule("model.layers")
        return [
            index for index, block in enumerate(blocks.children()) if not isinstance(next(block.parameters()), DTensor)
        ]
    whole = {
        item.untyped_storage().data_ptr()
        for item in gc.get_objects()
        if type(item) is torch.Tensor and tuple(item.shape) in MLP_SHAPES and item.layout == torch.strided
    }
    return [len(whole)]


def train_all(world: World, engine_name: str, tmp: str) -> list[dict[str, Any]]:
    return [train(world, engine_name, variant, Path(tmp)) for variant in variants()]


def variants() -> list[Variant]:
    return [
        replace(model, checkpoints=checkpoints, contiguous=checkpoints == 2)
        for name, model in MODELS.items()
        for checkpoints in (0, *CHECKPOINTS[name])
    ]


@functools.cache
def trained(engine_name: str) -> dict[Variant, list[dict[str, Any]]]:
    """What each rank reports, by variant."""
    with tempfile.TemporaryDirectory() as tmp:
        reports = run_ranks(train_all, RANKS, engine_name, tmp, timeout=240)
    return dict(zip(variants(), zip(*reports, strict=True), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("engine_name", ["deepspeed", "fsdp"])
@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_bit_for_bit(engine_name: str, name: str) -> None:
    reports = trained(engine_name)
    for variant in (
        variant for variant in variants() if replace(variant, checkpoints=0, contiguous=False) == MODELS[name]
    ):
        for plain, report in zip(reports[MODELS[name]], reports[variant], strict=True):
            assert report["losses"] == plain["losses"], variant
            assert all(map(torch.equal, report["weights"], plain["weights"])), variant
            if variant.checkpoints != 0:
                assert report["taken"]["blocks_recompute_seconds"] > 0
                kept = round(report["taken"]["checkpoints_gib"] * 2**30)
                item = 2 if variant.precision == "bf16" else 4
                assert kept == (variant.checkpoints or BLOCKS) * 3 * CONTEXT * 60 * item


def test_dropout_was_on() -> None:
    """Otherwise nothing above shows that the random state is restored."""
    losses = trained("fsdp")[MODELS["plain"]][0]["losses"]
    other = trained("fsdp")[MODELS["plain"]][1]["losses"]
    assert losses != other


def test_fsdp_holds_two_gathered_blocks_of_a_recomputed_segment() -> None:
    for report in trained("fsdp")[PROBED]:
        assert [after for _, after in report["gathered"]] == [[BLOCKS - 2, BLOCKS - 1]] * 4


def test_zero3_holds_no_gathered_weights_of_a_recomputed_segment() -> None:
    """There would be 15 more tensors of that shape, if the gathered values were what is saved."""
    for report in trained("deepspeed")[PROBED]:
        assert [after == before for before, after in report["gathered"]] == [True] * 4
