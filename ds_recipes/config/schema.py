"""Every setting of a run: its name, type, default, limits and documentation.

A field's name is both its flag and its YAML key. The `doc` of a field is the only source of the help text, of the
comments in a printed run file and of docs/reference/settings.md. Nothing here imports torch.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ds_recipes.config.checkpoint_settings import CheckpointConfig
from ds_recipes.config.data_settings import DataConfig
from ds_recipes.config.guard_settings import GuardConfig
from ds_recipes.config.hang_settings import HangConfig
from ds_recipes.config.setting import setting


@dataclass(frozen=True)
class ModelConfig:
    """The model and its tokenizer."""

    model_name: str | None = setting(
        None, "Model to start from: a folder with config.json and safetensors files, or a hub id.", is_path=True
    )
    model_config: str | None = setting(
        None, "A model's config JSON: train that shape from random weights. Instead of model_name.", unit="path"
    )
    tokenizer_name: str | None = setting(
        None, "Tokenizer: a folder or a hub id.", default_doc="the one of model_name", is_path=True
    )
    attn_implementation: str = setting(
        "sdpa",
        "Attention kernel, by its name in transformers.",
        choices=("sdpa", "eager", "flash_attention_2"),
    )
    use_fast_kernels: bool = setting(
        False, "Pick the fastest attention kernel that is installed. Instead of attn_implementation."
    )
    trust_remote_code: bool = setting(False, "Run Python code that comes with the model or the tokenizer.")
    model_part: str = setting(
        "whole",
        "What of the model is trained. language: of a model of text and images or sound the language model and its head; the "
        "rest stays as it is in the files, in checkpoints and exports too.",
        choices=("whole", "language"),
    )
    allow_unused_weights: bool = setting(
        False,
        "Train although the model's files hold tensors that the model does not have; they are left out of what is saved.",
    )
    added_tokens: tuple[str, ...] = setting(
        (),
        "Special tokens to add to the tokenizer, never split; the model's embedding grows where it has to. Programs that show "
        "what a model writes leave special tokens out (skip_special_tokens).",
    )
    added_plain_tokens: tuple[str, ...] = setting(
        (), "The same, but part of the text that is shown, such as <think> or <tool_call>."
    )
    eos_token: str | None = setting(
        None,
        "The token that ends a text, such as <|im_end|>: put behind documents, and kept as the tokenizer's eos_token.",
        default_doc="the tokenizer's own",
    )
    new_token_init: str = setting(
        "mean",
        "Values of the embedding's new rows. mean: the mean of all old rows; random: the model's own initialisation.",
        choices=("mean", "random"),
    )
    pad_vocabulary_to: int | None = setting(
        None,
        "Pad the embedding's rows to a multiple of this, such as 64.",
        unit="rows",
        least=1,
        default_doc="no padding",
    )


@dataclass(frozen=True)
class RunConfig:
    """The engine, the batch and the length of the run."""

    engine: str = setting(
        "deepspeed",
        "What shards the model and steps the optimizer. deepspeed: ZeRO; fsdp: PyTorch's FSDP2, told by the same JSON.",
        choices=("deepspeed", "fsdp"),
    )
    ds_config: str | None = setting(
        None,
        'DeepSpeed JSON; a value of "auto" in it is filled from this run.',
        default_doc="the same as ds_configs/zero3.json",
        unit="path",
    )
    precision: str = setting(
        "bf16",
        "bf16: bfloat16 compute with float32 master weights; fp32: all float32; fp16: float16 compute with loss scaling, "
        "for GPUs without bfloat16.",
        choices=("bf16", "fp32", "fp16"),
    )
    batch_size_training: int = setting(1, "Rows that one rank takes in one micro-step.", unit="rows", least=1)
    gradient_accumulation_steps: int | None = setting(
        None, "Micro-steps an optimizer step. Or set global_batch_size.", unit="micro-steps", least=1, default_doc="1"
    )
    global_batch_size: int | None = setting(
        None,
        "Rows an optimizer step over all ranks: batch_size_training x gradient_accumulation_steps x ranks.",
        unit="rows",
        least=1,
        default_doc="follows from gradient_accumulation_steps",
    )
    num_epochs: int | None = setting(
        None,
        "Passes over the training data. Of num_epochs, max_steps and max_tokens the first reached ends the run.",
        unit="epochs",
        least=1,
        default_doc="1 if neither max_steps nor max_tokens is set",
    )
    max_steps: int | None = setting(
        None, "Optimizer steps after which the run ends.", unit="steps", least=1, default_doc="no limit"
    )
    max_tokens: int | None = setting(
        None,
        "Tokens after which the run ends: every position of every row that is trained on, context_size a row, "
        "padding included, all ranks together; rounded up to a whole step.",
        unit="tokens",
        least=1,
        default_doc="no limit",
    )
    seed: int = setting(42, "Seed of the data order and of random weights.", least=0, below=2**32)
    activation_checkpointing: bool = setting(
        False, "Keep only each block's input and compute its activations again in backward: less memory, more time."
    )
    deterministic: bool = setting(False, "Use only kernels that give the same bits every time; may be slower.")
    expected_world_size: int | None = setting(
        None, "Refuse to start with any other number of ranks.", unit="ranks", least=1, default_doc="any number"
    )
    use_mpi: bool = setting(False, "Demand that rank and size come from MPI (mpirun), and refuse any other launcher.")
    start_timeout_seconds: int = setting(
        300, "How long ranks wait for each other at the start.", unit="seconds", least=1
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and the learning rate's course."""

    optimizer_type: str = setting("adamw", "adamw, or sgd (plain, with sgd_momentum).", choices=("adamw", "sgd"))
    lr: float = setting(1e-4, "Learning rate at its peak.", least=0)
    lr_min: float = setting(0.0, "Learning rate that the decay ends at.", least=0)
    lr_warmup: float = setting(
        0.0,
        "Warm-up to lr. Below 1: a fraction of the run; above 1: steps. 1 would be the whole run, which never reaches lr: it is "
        "refused.",
        unit="fraction or steps",
        least=0,
    )
    lr_warmup_style: str = setting(
        "linear",
        "Course of the warm-up; log rises fast at first (DeepSpeed's default in a scheduler section).",
        choices=("linear", "log"),
    )
    lr_warmup_start: float = setting(0.0, "Learning rate that the warm-up starts from.", least=0)
    lr_decay: float | None = setting(
        None,
        "cosine, linear: where lr_min is reached, counted from the start of the run; wsd: length of the decay at the "
        "end of the run; constant, inverse_sqrt: no meaning. Up to 1: a fraction of the run; above 1: steps.",
        unit="fraction or steps",
        above=0,
        default_doc="1.0 (the whole run); wsd: 0.1",
    )
    lr_decay_style: str = setting(
        "cosine",
        "Course after the warm-up. wsd holds lr and decays linearly at the end; inverse_sqrt falls as "
        "sqrt(warm-up / step).",
        choices=("cosine", "linear", "constant", "wsd", "inverse_sqrt"),
    )
    weight_decay: float = setting(
        0.1,
        "Decoupled weight decay (sgd: L2); not for biases, gains and a recurrence's rates. The start lists what decays.",
        least=0,
    )
    adam_beta1: float = setting(0.9, "Decay of Adam's first moment.", least=0, below=1)
    adam_beta2: float = setting(0.95, "Decay of Adam's second moment.", least=0, below=1)
    adam_eps: float = setting(1e-8, "Adam's epsilon.", above=0)
    sgd_momentum: float = setting(0.0, "Momentum of sgd; 0 keeps no state.", least=0, below=1)
    max_grad_norm: float = setting(1.0, "Clip the global gradient norm to this; 0 turns clipping off.", least=0)


@dataclass(frozen=True)
class AdapterConfig:
    """Parameter-efficient training."""

    peft_method: str | None = setting(
        None,
        "Adapter to train instead of the whole model. None, the only value yet, trains the whole model.",
        choices=("None",),
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation loss while training."""

    run_validation: bool = setting(
        True, "Compute the validation loss. Needs validation_data; without it nothing is done."
    )
    eval_interval: int = setting(
        500, "Evaluate every so many optimizer steps; 0: only at the end.", unit="steps", least=0
    )


@dataclass(frozen=True)
class LoggingConfig:
    """What is logged, how often and where to."""

    log_interval: int = setting(1, "Log a line every so many optimizer steps.", unit="steps", least=1)
    state_norms_interval: int = setting(
        10, "Log the norms of the optimizer's state every so many steps; 0 turns them off.", unit="steps", least=0
    )
    wandb_entity: str | None = setting(None, "wandb user or team.", default_doc="wandb's own default")
    wandb_project: str | None = setting(
        None,
        "wandb project.",
        default_doc="nothing goes to wandb, unless wandb_mode is online or offline: then ds_recipes",
    )
    wandb_name: str | None = setting(None, "Name of the run in wandb.", default_doc="the run folder's name")
    wandb_mode: str = setting(
        "auto",
        "auto: online if a key is present (WANDB_API_KEY or wandb login), else offline; disabled: no wandb.",
        choices=("auto", "online", "offline", "disabled"),
    )
    tensorboard: bool = setting(False, "Also write TensorBoard files into the run folder.")


@dataclass(frozen=True)
class DsConfig:
    """The user's DeepSpeed JSON, read and checked: every key in it is known and can be honoured.

    `tree` holds the keys that have an effect, in DeepSpeed's names of today, without what became a setting of the run and
    without "auto". `notes` are lines for the user, one for each key that changes nothing here.
    """

    path: str
    tree: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # what the engine has no counterpart of


@dataclass(frozen=True)
class Config:
    """All settings of one run, in groups. Frozen: numbers that follow from it live in a Plan.

    `origins` tells for each setting where its value came from: "command line", "run.yaml:3", "zero3.json" or "default".
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = RunConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    adapters: AdapterConfig = AdapterConfig()
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    hang: HangConfig = field(default_factory=HangConfig)
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    ds: DsConfig | None = None
    origins: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), compare=False)


GROUPS: dict[str, Any] = {
    "model": ModelConfig,
    "data": DataConfig,
    "run": RunConfig,
    "optimizer": OptimizerConfig,
    "adapters": AdapterConfig,
    "checkpoint": CheckpointConfig,
    "guards": GuardConfig,
    "hang": HangConfig,
    "evaluation": EvaluationConfig,
    "logging": LoggingConfig,
}

SETTINGS: dict[str, dataclasses.Field[Any]] = {
    item.name: item for group in GROUPS.values() for item in dataclasses.fields(group)
}


def values_of(config: Config) -> dict[str, Any]:
    """Every setting's name and value, in the order of the groups."""
    return {
        name: getattr(getattr(config, group), name)
        for group, cls in GROUPS.items()
        for name in cls.__dataclass_fields__
    }
