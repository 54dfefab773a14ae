"""Write ds_recipes/config/ds/table.json: every key of a DeepSpeed JSON, as the installed DeepSpeed itself knows it.

    python tools/make_ds_table.py

Sections that DeepSpeed reads with pydantic models give their fields, types, defaults and limits. The others are found by
letting DeepSpeed read a dictionary that writes down what is asked of it. Optimizers and schedulers give the parameters of
their constructors. Explanations, the stages where a key acts and what no source tells are in tools/ds_key_notes.yaml.
Run it after a new DeepSpeed is installed; it fails on a key without an explanation, and a test compares the file.
"""

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import yaml
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as ds_config
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "ds_recipes" / "config" / "ds" / "table.json"
NOTES = ROOT / "tools" / "ds_key_notes.yaml"

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "hybrid_engine": ds_config.HybridEngineConfig,
    "compile": CompileConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "tensor_parallel": TPTrainingConfig,
    "weight_quantization": WeightQuantConfig,
}
"""Sections that a model reads, and refuses what it does not know."""

READ_AS_IT_STANDS = (
    "activation_checkpointing",
    "flops_profiler",
    "aio",
    "autotuning",
    "autotuning.model_info",
    "data_types",
    "expert_parallel",
    "torch_autocast",
    "timers",
    "checkpoint",
    "checkpoint.writer",
    "checkpoint.parallel_write",
    "optimizer",
    "scheduler",
    "data_efficiency",
    "data_efficiency.data_sampling",
    "data_efficiency.data_sampling.curriculum_learning",
    "data_efficiency.data_sampling.dynamic_batching",
    "data_efficiency.data_routing",
    "data_efficiency.data_routing.random_ltd",
)
"""Sections that are read key by key: what DeepSpeed does not ask for is ignored without a word."""

NO_DEFAULT = object()
KINDS = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "text",
    Path: "text",
    list: "list",
    tuple: "list",
    dict: "object",
}


class Watched(dict[str, Any]):
    """A section that writes down each key that is asked for, with the default that the caller names."""

    def __init__(self, prefix: str, asked: dict[str, Any], content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self._prefix, self._asked = prefix, asked

    def get(self, key: str, default: Any = None) -> Any:
        path = self._prefix + key
        if self._asked.get(path, NO_DEFAULT) is NO_DEFAULT:
            self._asked[path] = default
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._asked.setdefault(f"{self._prefix}{key}", NO_DEFAULT)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._asked.setdefault(self._prefix + key, NO_DEFAULT)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self  # `in section.keys()` is seen too

    def __iter__(self) -> Iterator[str]:
        return iter(list(super().keys()))

    def __copy__(self) -> "Watched":
        return Watched(self._prefix, self._asked, dict(super().items()))


def keys_asked_for() -> dict[str, Any]:
    """Path: default, of everything that DeepSpeed's own reader asks of a JSON that holds the sections above."""
    asked: dict[str, Any] = {}
    content: dict[str, Any] = {"train_batch_size": 1}
    sections: dict[str, Watched] = {"": Watched("", asked, content)}
    for path in sorted(READ_AS_IT_STANDS, key=lambda path: path.count(".")):
        parent, _, name = path.rpartition(".")
        sections[path] = Watched(f"{path}.", asked, {})
        dict.__setitem__(sections[parent], name, sections[path])
    dict.__setitem__(sections["expert_parallel"], "enabled", False)  # an empty one is not read
    dict.__setitem__(sections["optimizer"], "type", "AdamW")
    dict.__setitem__(sections["scheduler"], "type", "WarmupLR")
    world = types.SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda *_: 1)
    real, ds_config.dist = ds_config.dist, world
    try:
        ds_config.DeepSpeedConfig(sections[""])
    finally:
        ds_config.dist = real
    return asked


def model_entries(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field of a model and of the models in it: path and entry."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        entry = {"checked": True} | kind_of(field.annotation)
        default = field.get_default(call_default_factory=True)
        inner = model_in(field.annotation)
        if inner is None and default is not PydanticUndefined:
            entry["default"] = plain(default)
        for limit in field.metadata:
            for ours, theirs in (("least", "ge"), ("above", "gt"), ("most", "le"), ("below", "lt")):
                if getattr(limit, theirs, None) is not None:
                    entry[ours] = getattr(limit, theirs)
        if extra.get("deprecated"):
            entry["replaced_by"] = extra.get("new_param") or extra.get("deprecated_msg", "")
        if field.alias and field.alias != name:
            entry["short_name"] = name
        path = f"{prefix}.{field.alias or name}"
        if inner is not None and "replaced_by" not in entry:
            entry["kind"] = "section"
            yield path, entry
            yield from model_entries(path, inner)
        else:
            yield path, entry


def model_in(annotation: Any) -> type[BaseModel] | None:
    inside = [annotation, *typing.get_args(annotation)]
    return next((each for each in inside if isinstance(each, type) and issubclass(each, BaseModel)), None)


def kind_of(annotation: Any) -> dict[str, Any]:
    """The kind of a field, its choices, and whether null may stand there."""
    args = typing.get_args(annotation)
    entry: dict[str, Any] = {}
    if type(None) in args:
        entry["null"] = True
        args = tuple(each for each in args if each is not type(None))
        annotation = args[0] if len(args) == 1 else annotation
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return entry | {"kind": "choice", "choices": list(typing.get_args(annotation))}
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return entry | {"kind": "choice", "choices": list(dict.fromkeys(member.value for member in annotation))}
    if origin is typing.Union:
        return entry | {"kind": "any"}
    item = next(iter(typing.get_args(annotation)), None) if origin is list else None
    if typing.get_origin(item) is typing.Literal:
        entry["choices"] = list(typing.get_args(item))
    elif item is str:
        entry["items"] = "text"
    return entry | {"kind": KINDS.get(origin or annotation, "any")}


def plain(value: Any) -> Any:
    """A default as JSON can hold it."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, dict | float | str):
        return value
    return str(value)


def parameters(*constructors: Any) -> dict[str, dict[str, Any]]:
    """Name: entry, of the parameters that any of these constructors takes."""
    found: dict[str, dict[str, Any]] = {}
    for constructor in constructors:
        for name, parameter in inspect.signature(constructor).parameters.items():
            if name in ("self", "params", "model_params", "optimizer", "last_batch_iteration", "kwargs", "args"):
                continue
            has_default = parameter.default is not inspect.Parameter.empty
            default = plain(parameter.default) if has_default else None
            entry = {"kind": KINDS.get(type(default), "any")} | (
                {"default": default} if has_default else {"needed": True}
            )
            found.setdefault(name, entry)
    return dict(sorted(found.items()))


def optimizers() -> dict[str, dict[str, Any]]:
    """Type in lower case: its parameters, whichever class DeepSpeed picks for it; none where they are not known."""
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    own = {"torch_adam": {"kind": "bool", "default": False}, "adam_w_mode": {"kind": "bool", "default": True}}
    adam = parameters(FusedAdam, DeepSpeedCPUAdam, torch.optim.AdamW) | own
    muon = {name: {"kind": "any"} for name in ("lr", "momentum", "weight_decay", "ns_method", "betas", "eps")}
    found = {
        "adam": adam,
        "adamw": adam,
        "adagrad": parameters(torch.optim.Adagrad, DeepSpeedCPUAdagrad),
        "lamb": parameters(FusedLamb),
        "lion": parameters(FusedLion, DeepSpeedCPULion),
        "muon": muon | {"muon_lr": {"kind": "any"}, "adam_lr": {"kind": "any"}} | own,
        "muadam": {},
        "muadamw": {},
        "musgd": {},
    }
    assert set(found) == set(ds_config.DEEPSPEED_OPTIMIZERS), set(found) ^ set(ds_config.DEEPSPEED_OPTIMIZERS)
    return found


def schedulers() -> dict[str, dict[str, Any]]:
    return {name: parameters(getattr(lr_schedules, name)) for name in lr_schedules.VALID_LR_SCHEDULES}


def make_table(notes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The whole table.

    Raises:
        SystemExit: a key has no explanation, or an explanation no key.
    """
    entries: dict[str, dict[str, Any]] = {}
    removed = ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS
    for path, default in keys_asked_for().items():
        if path not in removed and not path.startswith("optimizer.params."):
            known = {} if default is NO_DEFAULT else {"default": plain(default)}
            entries[path] = {"kind": KINDS.get(type(default), "any")} | known
    for path in (*READ_AS_IT_STANDS, *MODELS):
        entries[path] = {"kind": "section"}
    for path, model in MODELS.items():
        entries.update(model_entries(path, model))
    for name in removed:
        entries[name] = {"kind": "removed"}
    for name in ds_config._REMOVED_ZERO_CONFIG_KEYS:
        entries[f"zero_optimization.{name}"] = {"kind": "removed"}
    for path, note in notes.items():
        if note.get("add"):
            entries.setdefault(path, {})
    missing, unknown = set(entries) - set(notes), set(notes) - set(entries)
    if missing or unknown:
        raise SystemExit(f"{NOTES}: without an explanation: {sorted(missing)}; not in DeepSpeed: {sorted(unknown)}")
    for path, note in notes.items():
        entries[path] |= {name: value for name, value in note.items() if name != "add"}
    return {
        "deepspeed": deepspeed.__version__,
        "keys": dict(sorted(entries.items())),
        "optimizers": optimizers(),
        "schedulers": schedulers(),
    }


def read_notes() -> dict[str, dict[str, Any]]:
    """Path: what tools/ds_key_notes.yaml says, with the brackets before a text read as stages and condition."""
    raw = yaml.safe_load(NOTES.read_text(encoding="utf-8"))
    notes: dict[str, dict[str, Any]] = {}
    for path, note in raw.items():
        notes[path] = {"about": note} if isinstance(note, str) else dict(note)
        scope = re.match(r"\[([0-9,]+)(?:; (\S+)=(\S+))?\] ", notes[path]["about"])
        if scope:
            notes[path]["about"] = notes[path]["about"][scope.end() :]
            notes[path]["stages"] = [int(stage) for stage in scope[1].split(",")]
            if scope[2]:
                notes[path]["while"] = [scope[2], json.loads(scope[3]) if scope[3] in ("true", "false") else scope[3]]
    return notes


def as_text(table: Mapping[str, Any]) -> str:
    """One line a key, so that a change of DeepSpeed reads well as a difference."""
    parts = [f'"deepspeed": {json.dumps(table["deepspeed"])}']
    for name in ("keys", "optimizers", "schedulers"):
        lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in table[name].items()]
        parts.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    TABLE.write_text(as_text(make_table(read_notes())), encoding="utf-8")
    print(TABLE)
