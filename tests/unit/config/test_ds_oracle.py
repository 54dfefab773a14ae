"""The tables of keys and the check's verdicts, held against the installed DeepSpeed itself (in a process of its own)."""

import json
import math
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.config.ds.check import check_tree
from ds_recipes.config.ds.effective import effective_ds_config
from ds_recipes.config.ds.keys import TOP
from ds_recipes.config.ds.keys_zero import AIO, OLD_OFFLOAD, SHORT_NAMES, ZERO
from ds_recipes.config.ds.rules import Section, Switch
from ds_recipes.config.plan import Plan, make_plan
from ds_recipes.training.schedule import lr_at
from tests.unit.config.ds_trees import zero
from tests.unit.config.settings import load, write_json
from tests.unit.config.test_ds_check import BOTH_SAY
from tests.unit.config.test_ds_engines import ACCEPTED

PROBE = """
import json, logging, sys
logging.disable()
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor import config as monitors
from deepspeed.runtime import config as c, lr_schedules, precision_config as p
from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero import offload_config as o
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig

asked = json.load(sys.stdin)
models = {
    "zero_optimization": DeepSpeedZeroConfig,
    "leaf_module": DeepSpeedZeroLeafModuleConfig,
    "offload_optimizer": o.DeepSpeedZeroOffloadOptimizerConfig,
    "offload_param": o.DeepSpeedZeroOffloadParamConfig,
    "bf16": p.DeepSpeedBF16Config,
    "fp16": p.DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "hybrid_engine": c.HybridEngineConfig,
    "tensorboard": monitors.TensorBoardConfig,
    "wandb": monitors.WandbConfig,
    "csv_monitor": monitors.CSVConfig,
    "comet": monitors.CometConfig,
}
keys = {name: [n for k, f in model.model_fields.items() for n in (k, f.alias) if n] for name, model in models.items()}
keys["activation_checkpointing"], keys["aio"] = list(ACT_CHKPT_DEFAULT), list(AIO_DEFAULT_DICT)
keys["removed"], keys["removed_zero"] = list(c._REMOVED_TOP_LEVEL_CONFIG_KEYS), list(c._REMOVED_ZERO_CONFIG_KEYS)
asked_for = set()


class Watched(dict):  # tells which keys are asked for
    def get(self, key, default=None):
        asked_for.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        asked_for.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        asked_for.add(key)
        return super().__contains__(key)

    def keys(self):
        return self  # for "name in tree.keys()"

    def __copy__(self):
        return Watched(self)


c.DeepSpeedConfig(Watched({"train_batch_size": 1}))
keys["top"] = sorted(asked_for)


def accepts(tree):
    try:
        c.DeepSpeedConfig({"train_batch_size": 1, **tree})
    except Exception:
        return False
    return True


def sweep():
    for name in ("zero_optimization", "offload_optimizer", "offload_param", "bf16", "fp16"):
        for key in keys[name]:
            for stage in (1, 2, 3):
                for value in asked["values"]:
                    inner = {key: value}
                    zero = {"stage": stage}
                    if name == "zero_optimization":
                        yield {"zero_optimization": zero | inner}
                    elif name.startswith("offload"):
                        yield {"zero_optimization": zero | {name: inner}}
                    else:
                        yield {"zero_optimization": zero, name: {"enabled": True} | inner}


def rates(warmup_type, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = lr_schedules.WarmupLR(optimizer, 0.25, 1.0, steps, warmup_type)
    return [schedule.step() or schedule.get_lr()[0] for _ in range(steps + 2)]


print(json.dumps({
    "keys": keys,
    "sweep": [(tree, accepts(tree)) for tree in sweep()],
    "trees": [accepts(tree) for tree in asked["trees"]],
    "rates": {kind: rates(kind, asked["steps"]) for kind in ("linear", "log")},
}))
"""

VALUES = [True, False, 0, 1, 2, -1, 0.5, 5e8, "true", "5", "x", "cpu", "/tmp", None, [], {}]
STEPS = 9


def _without_auto(tree: Any) -> Any:
    """What a program such as this one leaves of "auto" for DeepSpeed: nothing."""
    if isinstance(tree, dict):
        return {key: _without_auto(value) for key, value in tree.items() if value != "auto"}
    return tree


@cache
def _effective() -> list[dict[str, Any]]:
    """What DeepSpeed would get for each file that it honours, and without a file."""
    configs = [load("--precision fp32")]
    with tempfile.TemporaryDirectory() as folder:
        for _, tree in ACCEPTED:
            write_json(Path(folder), tree)
            configs.append(load(f"--ds_config {folder}/zero3.json"))
    return [effective_ds_config(config, make_plan(config, 1)) for config in configs]


TREES = [_without_auto(tree) for tree in (*(tree for tree, _ in BOTH_SAY), *(tree for _, tree in ACCEPTED))]


@cache
def deepspeed_says() -> dict[str, Any]:
    asked = {
        "values": VALUES,
        "trees": TREES + _effective(),
        "steps": STEPS,
        "top": ("TRAIN_", "GRADIENT", "ZERO_", "DUMP"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input=json.dumps(asked), capture_output=True, text=True, timeout=180, check=True
    )
    says: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return says


def test_the_tables_know_every_key_of_its_models() -> None:
    keys = deepspeed_says()["keys"]
    known = {
        "zero_optimization": {*ZERO, *SHORT_NAMES, *OLD_OFFLOAD},
        "aio": set(AIO),
        "removed": set(TOP),
        "top": {*TOP, "optimizer", "scheduler", "bfloat16"},
        "removed_zero": set(ZERO),
    }
    for name in ("leaf_module", "offload_optimizer", "offload_param"):
        rule = ZERO[name]
        assert isinstance(rule, Section)
        known[name] = set(rule.keys)
    for name in keys.keys() - known.keys():
        rule = TOP[name]
        assert isinstance(rule, Section | Switch)
        known[name] = set(rule.keys)
    assert {name: set(keys[name]) - known[name] for name in known} == {name: set() for name in known}
    assert len(keys["zero_optimization"]) > 40 and len(keys["top"]) > 50


def _is_stricter_on_purpose(tree: dict[str, Any], problems: list[str]) -> bool:
    """true for a number is a slip (pydantic takes it for 1); a hysteresis below 0 has no meaning; the rest DeepSpeed's
    optimizers refuse when they are made (base_optimizer.py)."""
    return all(
        line.endswith(("not true", "not false"))
        or line.startswith(("fp16.hysteresis must", "bf16.bf16_master_weights_and_grads needs bf16_optimizer_states"))
        for line in problems
    )


def test_single_keys_are_refused_where_deepspeed_refuses_them_and_nowhere_else() -> None:
    sweep = deepspeed_says()["sweep"]
    differ = []
    for tree, accepted in sweep:
        problems = check_tree(tree).problems
        if accepted == bool(problems) and not (accepted and _is_stricter_on_purpose(tree, problems)):
            differ.append((tree, accepted, problems))
    assert differ == []
    assert len(sweep) > 3000 and 0.2 < sum(accepted for _, accepted in sweep) / len(sweep) < 0.8


# DeepSpeed's config takes these without a word: it ignores the key or the section, or fails later, or the value is wrong for
# what reads it.
IGNORED = (
    "is unknown", "is missing", "must be", "DeepSpeed has no such", "is refused by DeepSpeed as", "needs number_checkpoints",
    "is another type than",
)  # fmt: skip


def test_whole_files_are_refused_where_deepspeed_refuses_them() -> None:
    for tree, accepted in zip(TREES, deepspeed_says()["trees"], strict=False):
        problems = check_tree(tree).problems
        if not accepted:
            assert problems, tree
        else:
            assert all(any(words in line for words in IGNORED) for line in problems), (tree, problems)


def test_what_deepspeed_gets_is_accepted_by_it() -> None:
    assert deepspeed_says()["trees"][len(TREES) :] == [True] * len(_effective())


@pytest.mark.parametrize("kind", ["linear", "log"])
def test_the_warm_up_has_deepspeeds_shape(kind: str) -> None:
    """The loop takes step s where DeepSpeed's schedule over one more step takes s + 1: no update is lost to the start."""
    warmup = STEPS - 1
    config = load(f"--lr 1.0 --lr_warmup {warmup} --lr_warmup_style {kind} --lr_warmup_start 0.25 --max_steps 100")
    plan: Plan = make_plan(config, 1)
    ours = [lr_at(step, plan) for step in range(warmup)]
    theirs = deepspeed_says()["rates"][kind][1 : warmup + 1]
    assert all(math.isclose(one, two, rel_tol=1e-12) for one, two in zip(ours, theirs, strict=True)), (ours, theirs)
    assert ours[0] > 0.25 and lr_at(warmup, plan) == 1.0


def test_a_stage_3_file_has_no_problem() -> None:
    assert check_tree(zero(3)).problems == []
