"""What a rank does in the tests of ZeRO's stages: take an engine's whole state out, put it into another, freeze parameters."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ds_recipes.config.plan import make_plan
from ds_recipes.engine.base import Engine
from ds_recipes.engine.create import create_engine
from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World
from tests.contract.engines import Case, settings, train_and_report, train_steps
from tests.contract.oracle import llama

HUGE_LR = 2.0**20
"""One SGD step this long leaves weights that are the gradient, to float32's last digits."""

LOW = {"enabled": "auto", "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
UNEVEN = {"round_robin_gradients": True, "parameter_alignment": True, "reduce_bucket_size": 5000}


def zero(stage: int, top: dict[str, Any] | None = None, **keys: Any) -> str:
    """A JSON of this stage, with further keys of its section, and of the top."""
    return json.dumps({"zero_optimization": {"stage": stage, **keys}, **(top or {})})


def gradient(ds: str, **changes: Any) -> Case:
    return Case(lrs=(HUGE_LR,), ds=ds, **changes)


def adam(ds: str, **changes: Any) -> Case:
    return Case(optimizer="adamw", weight_decay=0.1, clip=0.5, lrs=(1e-3, 5e-4), rows_per_rank=2, ds=ds, **changes)


def relative(mine: torch.Tensor, reference: torch.Tensor) -> float:
    return float((mine.double() - reference.double()).norm() / reference.double().norm())


KINDS = ("fp32", "exp_avg", "exp_avg_sq")


class Saved:
    """A range reader over one rank's view of a saved run: full tensors by kind and name."""

    def __init__(
        self, tensors: dict[str, dict[str, torch.Tensor]], optimizer_step: int, missed_steps: dict[str, int]
    ) -> None:
        self.tensors = tensors
        self.optimizer_step = optimizer_step
        self.missed_steps = missed_steps
        self.num_read = 0

    @property
    def names(self) -> list[str]:
        return list(self.tensors["fp32"])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors["fp32"][name].shape)

    def has(self, kind: str) -> bool:
        return bool(self.tensors.get(kind))

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        self.num_read += out.numel()
        if name in self.tensors[kind]:
            out.copy_(self.tensors[kind][name].flatten()[start : start + out.numel()])


def save(engine: Engine, world: World) -> Saved:
    """The engine's whole state on every rank; checks that the ranks' ranges cover each parameter exactly once."""
    parts: list[dict[str, Any]] = [
        {"name": shard.name, "shape": shard.shape, "start": shard.start, "length": shard.length}
        | {kind: None if getattr(shard, kind) is None else getattr(shard, kind).clone() for kind in KINDS}
        for shard in engine.shards()
    ]
    tensors: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in KINDS}
    for pieces in zip(*world.gather(parts), strict=True):
        name, shape = pieces[0]["name"], pieces[0]["shape"]
        assert {piece["name"] for piece in pieces} == {name}, "ranks yield parameters in different orders"
        end = 0
        for piece in sorted(pieces, key=lambda piece: (piece["start"], piece["length"])):
            if piece["length"]:
                assert piece["start"] == end, f"{name}: a gap or an overlap at {end}"
                end += piece["length"]
            assert piece["fp32"].dtype == torch.float32 and piece["fp32"].numel() == piece["length"]
        assert end == torch.Size(shape).numel(), f"{name}: covered to {end}"
        for kind in KINDS:
            if pieces[0][kind] is not None:
                tensors[kind][name] = torch.cat([piece[kind] for piece in pieces]).reshape(shape)
    return Saved(tensors, engine.optimizer_step, dict(engine.usage.missed))


@dataclass(frozen=True)
class FrozenSource(ModelSource):
    """A model whose parameters do not train, but for those whose names hold one of `trained`."""

    trained: tuple[str, ...] = ()

    def skeleton(self, dtype: torch.dtype, attn_implementation: str, device: torch.device) -> PreTrainedModel:
        model = super().skeleton(dtype, attn_implementation, device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in self.trained))
        return model


def make(world: World, case: Case, tmp: str, trained: tuple[str, ...] | None = None) -> Engine:
    """An engine without values; `trained` freezes the other parameters."""
    config = settings(case, Path(tmp))
    hf_config = llama(case.tied)
    source = (
        ModelSource(hf_config, None, 7, False)
        if trained is None
        else FrozenSource(hf_config, None, 7, False, trained=trained)
    )
    return create_engine(config, make_plan(config, world.size), source, world)


def initial(case: Case, world: World) -> Any:
    return ModelSource(llama(case.tied), None, 7, False).initial_weights(world.device)


def reports(world: World, cases: Sequence[tuple[Case, int]], tmp: str) -> list[dict[str, Any]]:
    """`train_and_report` of several (case, steps), one after another in the same processes."""
    return [train_and_report(world, case, steps, tmp) for case, steps in cases]


def resumed(world: World, cases: Sequence[Case], tmp: str) -> list[dict[str, Any]]:
    """For each case: 4 steps in one go, and 2 of them again from the state after step 2 in a new engine."""
    found = []
    for case in cases:
        straight = make(world, case, tmp)
        straight.load_shards(initial(case, world))
        train_steps(straight, world, case, range(2))
        middle = save(straight, world)
        expected = train_steps(straight, world, case, range(2, 4))
        end = save(straight, world)
        straight.close()
        again = make(world, case, tmp)
        again.load_shards(middle)
        loaded = save(again, world)
        seen = train_steps(again, world, case, range(2, 4))
        again_end = save(again, world)
        again.close()
        found.append(
            {
                "steps": (expected, seen),
                "loaded": same(middle, loaded),
                "end": same(end, again_end),
                "read": middle.num_read,
                "whole": sum(t.numel() for kind in middle.tensors.values() for t in kind.values()),
            }
        )
    return found


def same(one: Saved, other: Saved) -> bool:
    """Equal in every bit, weights, moments and step."""
    return (
        one.optimizer_step == other.optimizer_step
        and {kind: set(t) for kind, t in one.tensors.items()} == {kind: set(t) for kind, t in other.tensors.items()}
        and all(
            torch.equal(tensor, other.tensors[kind][name])
            for kind, t in one.tensors.items()
            for name, tensor in t.items()
        )
    )


def saved_after(world: World, case: Case, steps: int, tmp: str) -> Saved:
    """Train and save."""
    engine = make(world, case, tmp)
    engine.load_shards(initial(case, world))
    train_steps(engine, world, case, range(steps))
    state = save(engine, world)
    engine.close()
    return state


def loaded_and_continued(world: World, cases: Sequence[Case], state: Saved, tmp: str) -> list[tuple[bool, list[Any]]]:
    """For each case: load the state; whether it comes out as it went in; two more steps."""
    found = []
    for case in cases:
        engine = make(world, case, tmp)
        engine.load_shards(state)
        is_same = same(state, save(engine, world))
        found.append((is_same, train_steps(engine, world, case, range(4, 6))))
        engine.close()
    return found


def frozen(world: World, cases: Sequence[Case], trained: tuple[str, ...], tmp: str) -> list[dict[str, Any]]:
    """For each case with most parameters frozen: the weights before and after a step, and a reload in a new engine."""
    found = []
    for case in cases:
        engine = make(world, case, tmp, trained)
        engine.load_shards(initial(case, world))
        before = {name: tensor.clone() for name, tensor in engine.weights()}
        (result,) = train_steps(engine, world, case, [0])
        state = save(engine, world)
        after = {name: tensor.clone() for name, tensor in engine.weights()}
        gradients = [name for name, p in engine.model.named_parameters() if not p.requires_grad and p.grad is not None]
        engine.close()
        again = make(world, replace(case, lrs=(0.0,)), tmp, trained)
        again.load_shards(state)
        is_same = same(state, save(again, world))
        (next_loss,) = train_steps(again, world, replace(case, lrs=(0.0,)), [0])
        again.close()
        found.append(
            {"before": before, "after": after, "result": result, "gradients": gradients, "same": is_same}
            | {"moments": set(state.tensors["exp_avg"]), "next_loss": next_loss["loss"]}
        )
    return found
