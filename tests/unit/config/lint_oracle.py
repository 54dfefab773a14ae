"""The installed DeepSpeed as the linter's oracle, asked once, in a process of its own; run as a program it answers."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ds_recipes.config.ds.table import Entry, ds_table

ROOT = Path(__file__).resolve().parents[3]
WILD = Path(__file__).parent / "wild"
WORLDS = (1, 2, 4, 8, 16, 64, 256)

VALUES: tuple[Any, ...] = (
    True, False, 0, 1, -1, 3, 0.5, 1.0, 1e9, "true", "off", "3", "5", "5.0", "0.3", "x", "auto", None, [], ["a"], [1], {},
    "cpu", "nvme", "none", "fp32", "BF16", "warn",
)  # fmt: skip
BASES: tuple[dict[str, Any], ...] = (
    {},
    {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}},
    {"zero_optimization": {"stage": 1}, "gradient_allreduce_op": "sum"},
)

MEETS_BASES = {"zero_optimization", "fp16", "bf16", "bfloat16", "compile", "gradient_allreduce_op", "torch_autocast"}
"""Sections that DeepSpeed compares with what a base holds."""

ADAM: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}} | ADAM


STARTS: dict[str, dict[str, Any]] = {
    "nothing": zero(2),
    "prescaled at stage 1": zero(1) | {"prescale_gradients": True},
    "no norm, no clipping": zero(2, compute_grad_norm=False) | {"gradient_clipping": 0},
}
"""Trees with which DeepSpeed's engine starts, as a measure of the others."""

STOPS: dict[str, dict[str, Any]] = {
    "optimizer.type": zero(2) | {"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3}}},
    "optimizer.params.max_grad_norm": zero(2) | {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}},
    "optimizer.params.foo": zero(2) | {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "foo": 1}}},
    "scheduler.params.warmup_num_steps": zero(2)
    | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
    "scheduler.params": zero(2) | {"scheduler": {"type": "WarmupLR"}},
    "data_types.grad_accum_dtype": zero(2) | {"data_types": {"grad_accum_dtype": "fp64"}},
    "zero_optimization.offload_optimizer.nvme_path": zero(3, offload_optimizer={"device": "nvme"}),
    "prescale_gradients": zero(2) | {"prescale_gradients": True},
    "gradient_predivide_factor": zero(3) | {"gradient_predivide_factor": 2.0},
    "zero_optimization.compute_grad_norm": zero(2, compute_grad_norm=False) | {"gradient_clipping": 1.0},
    "zero_optimization.legacy_stage1": zero(1, legacy_stage1=True),
    "managed_gradient_accumulation": zero(1, overlap_comm=True) | {"managed_gradient_accumulation": False},
}
"""By the key that is to blame: trees that DeepSpeed reads, and with which its engine does not start."""


def sweep() -> Iterator[tuple[Entry, Any, dict[str, Any]]]:
    """Every key of the table with every value, in every base: entry, value, tree."""
    for base in BASES:
        for entry in ds_table().keys.values():
            if entry.path.startswith(("optimizer.params", "scheduler.params")):
                continue
            if base and entry.path.partition(".")[0] not in MEETS_BASES:
                continue
            for value in (*VALUES, *(choice for choice in entry.choices if choice not in VALUES)):
                tree = deepcopy(base)
                section = tree
                for name in entry.parent.split(".") if entry.parent else ():
                    section = section.setdefault(name, {})
                section[entry.name] = value
                yield entry, value, tree


@cache
def deepspeed_says() -> dict[str, Any]:
    """`table`: what the generator writes now. The others: by position or name, whether DeepSpeed takes it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.config.lint_oracle"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    says: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return says


def main() -> dict[str, Any]:
    """Everything that the tests ask, in one start of DeepSpeed."""
    import logging

    logging.disable()
    sys.path.insert(0, str(ROOT / "tools"))
    import make_ds_table
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    wild = {file.stem: _read(file.read_text(encoding="utf-8")) for file in WILD.glob("*.json")}
    types = {
        name: tree["optimizer"]["type"] for name, tree in wild.items() if tree and "type" in tree.get("optimizer", {})
    }
    return {
        "table": make_ds_table.as_text(make_ds_table.make_table(make_ds_table.read_notes())),
        "started": _started(),
        "sweep": [_accepts(deepcopy(tree), 1) for _, _, tree in sweep()],
        "wild": {
            name: tree is not None and any(_accepts(deepcopy(tree), world) for world in WORLDS)
            for name, tree in wild.items()
        },
        "optimizers": {
            name: kind.lower() in DEEPSPEED_OPTIMIZERS or hasattr(torch.optim, kind) for name, kind in types.items()
        },
    }


def _read(text: str) -> dict[str, Any] | None:
    import hjson
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

    try:
        return dict(hjson.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys))
    except Exception:
        return None


def _accepts(tree: dict[str, Any], world: int) -> bool:
    """Whether DeepSpeed reads it for this number of ranks, once a program has filled what is "auto" at the top."""
    from deepspeed.runtime import config as ds_config

    ds_config.dist = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda *_: world)
    keys = ds_table().keys
    is_section = {name: name in keys and keys[name].kind == "section" for name in tree}
    tree = {name: value for name, value in tree.items() if value != "auto" or is_section[name]}
    if tree.get("train_batch_size") is None and tree.get("train_micro_batch_size_per_gpu") is None:
        tree["train_micro_batch_size_per_gpu"] = 1
    try:
        ds_config.DeepSpeedConfig(tree)
    except Exception:
        return False
    return True


def _started() -> dict[str, bool]:
    """Whether DeepSpeed's engine starts with these trees, on one rank without a compiler."""
    import deepspeed
    import torch

    def starts(tree: dict[str, Any]) -> bool:
        model = torch.nn.Linear(4, 4)
        config = {"train_batch_size": 1, **tree}
        try:
            deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
        except Exception:
            return False
        return True

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with tempfile.TemporaryDirectory() as folder:
        deepspeed.init_distributed("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        started = {name: starts(tree) for name, tree in (STARTS | STOPS).items()}
        torch.distributed.destroy_process_group()
    return started


if __name__ == "__main__":
    print(json.dumps(main()))
