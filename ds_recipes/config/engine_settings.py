"""What an engine is asked for: the run's settings and its DeepSpeed JSON read together, the same for every engine.

Engines read these; the JSON itself only where it is handed to DeepSpeed. Dtypes are named as torch names them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_recipes.config.ds.keys_precision import DTYPE_OF
from ds_recipes.config.schema import Config


@dataclass(frozen=True)
class Sharding:
    """What is sharded, over which ranks, and where it lies."""

    stage: int
    """1: the optimizer's state; 2: gradients too; 3: parameters too."""

    group_size: int | None
    """Ranks that hold one copy of the parameters together (zero_hpz_partition_size); None: all ranks."""

    optimizer_on: str  # "device", "cpu" or "nvme"
    parameters_on: str  # "device", "cpu" or "nvme"
    pin_memory: bool  # of what lies on the host


@dataclass(frozen=True)
class Precision:
    """Dtypes by torch's names. A checkpoint records them, and a continued run keeps them."""

    parameters: str  # what forward and backward read
    master: str  # what the optimizer steps
    moments: str
    gradient_accumulation: str  # over micro-steps
    reduction: str  # over ranks
    autocast: str | None = None  # of the products in forward, where torch's autocast is on

    def __str__(self) -> str:
        """One line for the manifest, compared when a run is continued."""
        parts = [
            f"parameters {self.parameters}",
            f"master {self.master}",
            f"moments {self.moments}",
            f"gradient accumulation {self.gradient_accumulation}",
            f"reduction {self.reduction}",
        ]
        return ", ".join(parts + ([f"autocast {self.autocast}"] if self.autocast else []))


@dataclass(frozen=True)
class Checkpointing:
    """How activations are kept and computed again (the JSON's activation_checkpointing)."""

    number_checkpoints: int | None  # block inputs that are kept; None: one a block
    on_cpu: bool  # keep them in host memory
    contiguous: bool  # in one buffer that is used again
    synchronize: bool  # wait for the device at each
    profile: bool  # measure them


@dataclass(frozen=True)
class LossScaling:
    """Loss scaling of fp16, in DeepSpeed's terms."""

    static: float | None  # a fixed scale; None: dynamic
    initial_power: int  # begin with 2 ** this
    window: int  # steps without overflow after which the scale is doubled
    hysteresis: int  # overflows that are spent before the scale is halved
    consecutive_hysteresis: bool  # refill it after a step without overflow
    least: float  # smallest scale


@dataclass(frozen=True)
class EngineSettings:
    """All of it."""

    sharding: Sharding
    precision: Precision
    checkpointing: Checkpointing | None  # None: activations are kept
    loss_scaling: LossScaling | None  # None but for fp16


def engine_settings(config: Config) -> EngineSettings:
    """Read them from a config that was checked."""
    tree = {} if config.ds is None else config.ds.tree
    return EngineSettings(
        sharding=_sharding(_section(tree, "zero_optimization")),
        precision=_precision(config.run.precision, tree, config.run.engine),
        checkpointing=_checkpointing(_section(tree, "activation_checkpointing"))
        if config.run.activation_checkpointing
        else None,
        loss_scaling=_loss_scaling(_section(tree, "fp16")) if config.run.precision == "fp16" else None,
    )


def _sharding(zero: Mapping[str, Any]) -> Sharding:
    optimizer, parameters = _section(zero, "offload_optimizer"), _section(zero, "offload_param")
    group_size = int(zero.get("zero_hpz_partition_size", 1))
    return Sharding(
        stage=int(zero.get("stage", 3)),
        group_size=group_size if group_size > 1 else None,
        optimizer_on=_place(optimizer),
        parameters_on=_place(parameters),
        pin_memory=bool(optimizer.get("pin_memory", parameters.get("pin_memory", True))),
    )


def _place(offload: Mapping[str, Any]) -> str:
    device = offload.get("device", "none")
    return "device" if device == "none" else str(device)


def _precision(precision: str, tree: Mapping[str, Any], engine: str) -> Precision:
    """Gradients are added up in the master weights' dtype and summed in float32, unless the JSON says otherwise."""
    compute = DTYPE_OF[precision]
    half = _section(tree, precision) if precision != "fp32" else {}
    master = compute if half.get(f"{precision}_master_weights_and_grads", False) else "float32"
    section = _section(tree, "torch_autocast")
    autocast = DTYPE_OF[str(section.get("dtype", "bfloat16"))] if section.get("enabled", False) else None
    reduction = DTYPE_OF[str(tree.get("communication_data_type") or "fp32").lower()]
    if autocast and engine == "deepspeed":  # of the safe modules' gradients (deepspeed/runtime/torch_autocast.py)
        reduction = autocast if section.get("lower_precision_safe_modules") else "float32"
    return Precision(
        parameters=compute,
        master=master,
        moments=master if half.get("bf16_optimizer_states", False) else "float32",
        gradient_accumulation=DTYPE_OF[str(_section(tree, "data_types").get("grad_accum_dtype", master))],
        reduction=reduction,
        autocast=autocast,
    )


def _checkpointing(section: Mapping[str, Any]) -> Checkpointing:
    number = section.get("number_checkpoints")
    return Checkpointing(
        number_checkpoints=None if number is None else int(number),
        on_cpu=bool(section.get("cpu_checkpointing", False)),
        contiguous=bool(section.get("contiguous_memory_optimization", False)),
        synchronize=bool(section.get("synchronize_checkpoint_boundary", False)),
        profile=bool(section.get("profile", False)),
    )


def _loss_scaling(section: Mapping[str, Any]) -> LossScaling:
    scale = float(section.get("loss_scale", 0))
    return LossScaling(
        static=scale or None,
        initial_power=int(section.get("initial_scale_power", 16)),
        window=int(section.get("loss_scale_window", 1000)),
        hysteresis=int(section.get("hysteresis", 2)),
        consecutive_hysteresis=bool(section.get("consecutive_hysteresis", False)),
        least=float(section.get("min_loss_scale", 1)),
    )


def _section(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The keys of a section that have a value: neither null nor "auto"."""
    section = tree.get(name) or {}
    return {key: value for key, value in section.items() if value not in (None, "auto")}
