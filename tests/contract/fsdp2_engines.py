"""What a rank does in the tests of FSDP2 alone: engines built from settings, without a JSON between."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig, PreTrainedModel, Qwen2MoeConfig

from ds_recipes.config.engine_settings import Checkpointing, EngineSettings, LossScaling, Precision, Sharding
from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import OptimizerConfig
from ds_recipes.engine.base import StepResult
from ds_recipes.engine.fsdp2.step import Fsdp2Engine
from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World
from tests.contract.oracle import CONTEXT, VOCABULARY, global_batch, joined, llama

ROWS = 12
HUGE_LR = 2.0**20
"""One SGD step this long leaves weights that are the gradient, to float32's last digits."""

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: llama(tied=False),
    "tied": lambda: llama(tied=True),
    "mixtral": lambda: MixtralConfig(
        **SMALL, intermediate_size=36, num_key_value_heads=4, num_local_experts=3, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SMALL,
        intermediate_size=36,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=28,
        num_key_value_heads=4,
        num_experts=5,
        num_experts_per_tok=2,
    ),
    "two_experts": lambda: llama(tied=False),
    "shared": lambda: llama(tied=False),
    "scalar": lambda: llama(tied=False),
    "four_blocks": lambda: LlamaConfig(**SMALL | {"num_hidden_layers": 4}, intermediate_size=36),
    "deep": lambda: LlamaConfig(
        vocab_size=20011, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8
    ),
}


@dataclass(frozen=True)
class How:
    """One way to build an engine and to split a global batch."""

    model: str = "llama"
    stage: int = 3
    group_size: int | None = None
    offload: bool = False
    parameters: str = "float32"
    master: str = "float32"
    moments: str | None = None  # the master's
    reduction: str = "float32"
    autocast: str | None = None
    checkpointing: bool = False
    scaling: LossScaling | None = None
    frozen: str | None = None  # parameters whose name holds this
    optimizer: str = "sgd"
    clip: float = 0.0
    rows_per_rank: int = 1


class TwoExperts(nn.Module):
    """Two experts of a block as modules of their own, of which a micro-batch uses one."""

    route = 0

    def __init__(self, mlp: type[nn.Module], config: LlamaConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp(config), mlp(config)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.experts[TwoExperts.route](hidden)
        return output


@dataclass(frozen=True)
class Source(ModelSource):
    """A model whose skeleton is changed after it is built."""

    how: How = field(default_factory=How)

    def skeleton(self, dtype: torch.dtype, attn_implementation: str, device: torch.device) -> PreTrainedModel:
        model = super().skeleton(dtype, attn_implementation, device)
        if self.how.model == "two_experts":
            for layer in model.model.layers:
                with torch.device("meta"):
                    layer.mlp = TwoExperts(type(layer.mlp), model.config).to(dtype)
        if self.how.model == "shared":
            model.model.layers[1].mlp = model.model.layers[0].mlp
        if self.how.model == "scalar":
            model.model.layers[1].gain = nn.Parameter(torch.ones((), device="meta"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.how.frozen is None or self.how.frozen not in name)
        return model


def source(how: How) -> Source:
    return Source(MODELS[how.model](), None, 7, False, how=how)


def engine_of(world: World, how: How, loaded: bool = True) -> Fsdp2Engine:
    micro_steps = ROWS // (how.rows_per_rank * world.size)
    end = (None, None, None, 1.0, 0.0, "constant", None, None)
    plan = Plan(world.size, how.rows_per_rank, micro_steps, ROWS, CONTEXT, ROWS * CONTEXT, *end)
    place = "cpu" if how.offload else "device"
    settings = EngineSettings(
        Sharding(how.stage, how.group_size, place, place, pin_memory=True),
        Precision(how.parameters, how.master, how.moments or how.master, how.master, how.reduction, how.autocast),
        Checkpointing(None, False, False, False, False) if how.checkpointing else None,
        how.scaling,
    )
    optimizer = OptimizerConfig(optimizer_type=how.optimizer, max_grad_norm=how.clip, weight_decay=0.0)
    skeleton = source(how).skeleton(getattr(torch, how.parameters), "sdpa", world.device)
    engine = Fsdp2Engine(skeleton, world, plan, optimizer, settings)
    if loaded:
        engine.load_shards(source(how).initial_weights(world.device))
    return engine


def step(
    engine: Fsdp2Engine,
    world: World,
    how: How,
    number: int,
    lr: float,
    before_update: Callable[[], object] = lambda: None,
) -> tuple[float, StepResult]:
    """Train global batch `number`; returns the loss a target token."""
    rows = global_batch(number, ROWS)
    target_tokens = sum(row.num_target_tokens for row in rows)
    total = 0.0
    for micro in range(ROWS // (how.rows_per_rank * world.size)):
        first = (micro * world.size + world.rank) * how.rows_per_rank
        TwoExperts.route = first % 2
        total += float(engine.backward(joined(rows[first : first + how.rows_per_rank]), 1 / target_tokens))
    before_update()
    result = engine.update(lr)
    return world.sum([total])[0] / target_tokens, result


def weights_of(engine: Fsdp2Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.weights()}
