"""The step under FSDP2: gradients are summed over ranks, masters and moments are sharded tensors."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ds_recipes.config.engine_settings import EngineSettings
from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import OptimizerConfig
from ds_recipes.data.batch import MicroBatch
from ds_recipes.engine.activations import ActivationRecord, install_checkpointing
from ds_recipes.engine.base import Engine, Shard, StepResult, weighted
from ds_recipes.engine.buffers import SavedBuffers
from ds_recipes.engine.fsdp2.build import (
    check_kept,
    check_precision,
    make_mesh,
    mixed_precision,
    shard_model,
    sharded_modules,
    watch_gradients,
)
from ds_recipes.engine.fsdp2.local_state import LocalState
from ds_recipes.engine.input_gradient import loss_and_input_gradients
from ds_recipes.engine.inputs import model_inputs
from ds_recipes.engine.loss_scale import LossScaler
from ds_recipes.engine.optimizer import make_optimizer, moments_in
from ds_recipes.engine.replicas import Replica
from ds_recipes.engine.unused import Usage
from ds_recipes.models.skeleton import kept_in_float32, kept_line
from ds_recipes.models.weight_decay import decayed_names
from ds_recipes.ranges import RangeReader
from ds_recipes.world.group import World


class Fsdp2Engine(Engine):
    """PyTorch FSDP2 with torch's AdamW or SGD."""

    def __init__(
        self,
        skeleton: PreTrainedModel,
        world: World,
        plan: Plan,
        optimizer: OptimizerConfig,
        settings: EngineSettings,
    ) -> None:
        self._world = world
        self._settings = settings
        self._micro_steps = plan.micro_steps
        self._micro_steps_done = 0
        self._max_grad_norm = optimizer.max_grad_norm
        decayed = decayed_names(skeleton)
        check_precision(settings.precision)
        self._kept = kept_in_float32(skeleton, getattr(torch, settings.precision.parameters))
        check_kept(self._kept, settings.precision)
        mesh = world.check("sharding", lambda: make_mesh(world, settings.sharding.group_size))
        self.activations = world.check("activation checkpointing", lambda: self._checkpoint_activations(skeleton))
        world.check("sharding", lambda: shard_model(skeleton, mesh, world.device, settings, self._kept))
        self.model = skeleton
        self._modules = sharded_modules(skeleton)
        self._root = self._modules[0]
        self._buffers = SavedBuffers(skeleton, world, computes_again=self.activations is not None)
        self.usage = Usage([name for name, parameter in skeleton.named_parameters() if parameter.requires_grad])
        watch_gradients(skeleton, self.usage)
        self._local = LocalState(skeleton, mesh)
        self._optimizer = make_optimizer(self._local, decayed, optimizer)
        self._local.adopt(self._optimizer)
        self._order = world.gather(self._local.rank_in_parameter)
        self._scaler = None if settings.loss_scaling is None else LossScaler(settings.loss_scaling)
        self.optimizer_step = 0

    def _checkpoint_activations(self, skeleton: PreTrainedModel) -> ActivationRecord | None:
        wanted = self._settings.checkpointing
        return None if wanted is None else install_checkpointing(skeleton, wanted, self._world.device)

    def backward(self, batch: MicroBatch, scale: float) -> torch.Tensor:
        """Add the gradient of `scale` x (sum of token losses); return that sum, a scalar on the device.

        Below stage 3 parameters are gathered once a step; replicas add up their gradients once a step.
        """
        self._micro_steps_done += 1
        is_last = self._micro_steps_done == self._micro_steps
        if self._settings.sharding.stage < 3:
            self._root.set_reshard_after_backward(is_last)
        if self._local.replicas > 1:
            self._root.set_requires_all_reduce(is_last)
        self._learn_transform()
        inputs = model_inputs(batch, self._world.device, self.attention)
        loss = self._buffers.train(
            lambda: self._forward(**inputs), lambda loss: weighted(loss, scale * self._loss_scale).backward()
        )
        return loss.detach()

    @property
    def _loss_scale(self) -> float:
        return 1.0 if self._scaler is None else self._scaler.scale

    def _forward(self, **inputs: Any) -> torch.Tensor:
        dtype = self._settings.precision.autocast
        context = (
            contextlib.nullcontext()
            if dtype is None  # a cache would hold a whole model in that dtype
            else torch.autocast(self._world.device.type, getattr(torch, dtype), cache_enabled=False)
        )
        with context:
            output: torch.Tensor = self.model(**inputs)
        return output

    @torch.no_grad()
    def update(self, lr: float) -> StepResult:
        """Clip, step with the given learning rate and clear the gradients; a non-finite gradient skips the step."""
        assert self._micro_steps_done == self._micro_steps, "update() before the last micro-step"
        self._micro_steps_done = 0
        self._free_gathered()
        unused = self.usage.agree(self._world).unused
        gradients = self._local.take_gradients(unused)
        loss_scale = self._loss_scale
        norm = self._norm(gradients) / loss_scale
        applied = math.isfinite(norm)
        if applied:
            clip = self._max_grad_norm / norm if 0 < self._max_grad_norm < norm else 1.0
            if clip != loss_scale:
                torch._foreach_mul_(gradients, clip / loss_scale)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self.optimizer_step += 1
            self.usage.stepped(unused)
        self._local.clear_gradients()
        self._buffers.end_step(applied)
        if self._scaler is None:
            return StepResult(norm, applied, unused=unused)
        self._scaler.update(overflow=not applied)
        return StepResult(norm, applied, loss_scale, unused)

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        """Global L2 norm, summed in float64, equal on all ranks. The step's one wait for the device."""
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        if gradients:
            norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float64)
            total += torch.stack(norms).square().sum().to(total.device)
        dist.all_reduce(total)
        return float((total / self._local.replicas).sqrt())

    def _free_gathered(self) -> None:
        """Drop parameters that a forward alone left gathered: they would hide the shards' new values."""
        for module in self._modules:
            module.reshard()

    def loss_and_input_gradients(self, batch: MicroBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A batch's loss and its derivatives by what the embedding gave; see `Engine.loss_and_input_gradients`."""
        self._learn_transform()
        inputs = model_inputs(batch, self._world.device, self.attention)
        with self._buffers.unchanged():
            result = loss_and_input_gradients(self.model, lambda: self._forward(**inputs), self.activations)
        self._free_gathered()
        self._local.clear_gradients()  # FSDP2 makes zeros for parameters that backward does not reach
        return result

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> tuple[torch.Tensor, int]:
        """Sum of token losses and number of target tokens of one micro-batch, without gradients or dropout."""
        self._learn_transform()
        self.model.eval()
        with self._buffers.unchanged():
            loss = self._forward(**model_inputs(batch, self._world.device, self.attention))
        self.model.train()
        return loss, batch.num_target_tokens

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, context, vocabulary] of the model's own forward, one document a row."""
        self.model.eval()
        input_ids = input_ids.to(self._world.device)
        with self._buffers.unchanged():
            logits = self._forward(input_ids=input_ids)
        self.model.train()
        return logits.float()

    def shards(self) -> Iterator[Shard]:
        """This rank's flat ranges in storage order; no communication."""
        return self._local.shards()

    def load_shards(self, reader: RangeReader) -> None:
        """Fill this rank's ranges from `reader`, each rank only its own, and the saved buffers."""
        self._free_gathered()
        self._buffers.load(reader)
        if moments_in(reader, self._optimizer):
            self.optimizer_step = reader.optimizer_step
            self.usage.load(reader)
        self._local.load(reader, self.usage.missed)

    def replicas_between_steps(self) -> list[Replica]:
        """The model's buffers."""
        return self._buffers.replicas()

    def replicas_before_update(self) -> list[Replica]:
        """Masters, moments and step counts, of the replicas of HSDP."""
        return self._local.replicated()

    def saved_buffers(self) -> Mapping[str, torch.Tensor]:
        """Copies of the saved buffers by name, equal on all ranks."""
        return self._buffers.copies()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full float32 master tensors one by one, on every rank, in storage order."""
        ranks = sorted(range(self._world.size), key=lambda rank: self._order[rank])
        for shard in self.shards():
            pieces = self._world.gather_tensor(shard.fp32)
            yield shard.name, torch.cat([pieces[rank] for rank in ranks]).reshape(shard.shape)

    def scaler_state(self) -> dict[str, float]:
        """Where dynamic loss scaling stands; empty without it."""
        return {} if self._scaler is None else self._scaler.state()

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Go on where `scaler_state` was taken; an empty one changes nothing."""
        if self._scaler is not None and state:
            self._scaler.load(state)

    def describe(self) -> dict[str, Any]:
        """Precision, sharding and optimizer, for the start's table and the manifest."""
        policy = mixed_precision(self._settings.precision)
        return {
            "engine": "fsdp",
            "torch": torch.__version__,
            "sharding": self._sharding(),
            "optimizer": type(self._optimizer).__name__,
            "optimizer_device": self._local.device.type,
            "parameters": _name(policy.param_dtype),
            "kept_in_float32": kept_line(self._kept),
            "master": _name(self._local.master_dtype),
            "moments": _name(self._local.moments_dtype),
            "gradient_accumulation": _name(self._local.master_dtype),
            "reduction": _name(policy.reduce_dtype),
            "autocast": self._settings.precision.autocast,
            "attention": self.attention,
            "activations": None if self.activations is None else str(self.activations),
        }

    def _sharding(self) -> str:
        ranks = self._world.size // self._local.replicas
        kept = "resharded after forward" if self._settings.sharding.stage == 3 else "kept for the whole step"
        if self._local.replicas == 1:
            return f"FSDP2 over {ranks} {'rank' if ranks == 1 else 'ranks'}, parameters {kept}"
        return f"FSDP2 with HSDP: {self._local.replicas} replicas over {ranks} ranks each, parameters {kept}"

    def close(self) -> None:
        """Free what is gathered and the gradients."""
        self._free_gathered()
        self._local.clear_gradients()


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
