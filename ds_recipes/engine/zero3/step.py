"""The step under ZeRO, with DeepSpeed's own averaging undone so that the loop's loss convention holds."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from transformers import PreTrainedModel

from ds_recipes.config.engine_settings import EngineSettings
from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import OptimizerConfig
from ds_recipes.data.batch import MicroBatch
from ds_recipes.engine.activations import ActivationRecord, install_checkpointing
from ds_recipes.engine.base import Engine, Shard, Sink, StepResult, weighted
from ds_recipes.engine.buffers import SavedBuffers
from ds_recipes.engine.input_gradient import loss_and_input_gradients
from ds_recipes.engine.inputs import model_inputs
from ds_recipes.engine.optimizer import make_optimizer, moments_in
from ds_recipes.engine.replicas import Replica
from ds_recipes.engine.unused import Usage
from ds_recipes.engine.zero3 import scaler
from ds_recipes.engine.zero3.build import place_model, share_offloaded_gradients, start_deepspeed
from ds_recipes.engine.zero3.experts import give_every_expert_a_gradient
from ds_recipes.engine.zero3.kept_dtypes import check_kept
from ds_recipes.engine.zero3.leaf import leaf_class_names, mark_expert_blocks, without_leaf_hooks
from ds_recipes.engine.zero3.local_state import LocalState
from ds_recipes.engine.zero3.low_stages import LowStageState, forget_gradients
from ds_recipes.engine.zero3.native_save import save_native
from ds_recipes.engine.zero3.nvme import settle
from ds_recipes.engine.zero3.placement import clear_placement, prepare_placement
from ds_recipes.engine.zero3.precision import real_precision
from ds_recipes.engine.zero3.state import State
from ds_recipes.engine.zero3.unused import PartwiseSteps, check_used_alike, forget_old_gradients, watch_gradients
from ds_recipes.models.skeleton import kept_in_float32, kept_line
from ds_recipes.models.weight_decay import decayed_names
from ds_recipes.ranges import RangeReader
from ds_recipes.world.group import World


class ZeroEngine(Engine):
    """ZeRO 1, 2 or 3 with torch's AdamW or SGD."""

    def __init__(
        self,
        skeleton: PreTrainedModel,
        world: World,
        plan: Plan,
        ds_json: dict[str, Any],
        optimizer: OptimizerConfig,
        settings: EngineSettings,
    ) -> None:
        self._world = world
        self._stage = settings.sharding.stage
        group_size = settings.sharding.group_size
        self._groups = f", a second copy in groups of {group_size} (hpZ)" if group_size else ""
        self._optimizer_on = settings.sharding.optimizer_on
        self._scales_loss = settings.loss_scaling is not None
        self._micro_steps = plan.micro_steps
        self._micro_steps_done = 0
        decayed = decayed_names(skeleton)
        self._in_expert_blocks: frozenset[str] = frozenset()
        if self._stage == 3:
            mark_expert_blocks(skeleton)
        else:
            self._in_expert_blocks = give_every_expert_a_gradient(skeleton)
        ds_json = prepare_placement(ds_json, skeleton, world)
        self._ds_json = ds_json
        self.activations = world.check(
            "activation checkpointing", lambda: self._checkpoint_activations(skeleton, settings)
        )
        self._kept = kept_in_float32(skeleton, getattr(torch, settings.precision.parameters))
        check_kept(self._kept, settings, ds_json)
        place_model(skeleton, ds_json, settings, world.device)
        self.model = skeleton
        self._buffers = SavedBuffers(skeleton, world, computes_again=self.activations is not None)
        torch_optimizer = make_optimizer(skeleton, decayed, optimizer)
        self._deepspeed = start_deepspeed(skeleton, torch_optimizer, ds_json, self._kept)
        self._zero = self._deepspeed.optimizer
        self.usage = Usage([name for name, parameter in skeleton.named_parameters() if parameter.requires_grad])
        watch_gradients(skeleton, self.usage)
        if self._scales_loss:
            scaler.hold(self._zero.loss_scaler)
        self._local = self._make_state()
        self._steps = PartwiseSteps(torch_optimizer, self.usage, self._local.parts())
        self._forget_old_gradients = forget_old_gradients(self._zero, self._stage)
        self.optimizer_step = 0

    def _checkpoint_activations(self, skeleton: PreTrainedModel, settings: EngineSettings) -> ActivationRecord | None:
        wanted = settings.checkpointing
        return None if wanted is None else install_checkpointing(skeleton, wanted, self._world.device)

    def _make_state(self) -> State:
        if self._stage < 3:
            return LowStageState(self._zero, self.model, self._world)
        share_offloaded_gradients(self._zero)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return LocalState(self._zero, names, self._world.rank)

    @property
    def _reduces_in_order(self) -> bool:
        """True where each rank sums its own gradients with whatever the others have at that place."""
        return self._stage < 3 and not isinstance(self._zero, BF16_Optimizer)

    def backward(self, batch: MicroBatch, scale: float) -> torch.Tensor:
        """Add the gradient of `scale` x (sum of token losses); return that sum, a scalar on the device.

        DeepSpeed divides gradients by the number of ranks; multiplying the loss by it makes the sum over ranks whole.
        """
        self._micro_steps_done += 1
        self._deepspeed.set_gradient_accumulation_boundary(self._micro_steps_done == self._micro_steps)
        self._learn_transform()
        inputs = model_inputs(batch, self._world.device, self.attention)
        loss: torch.Tensor = self._buffers.train(
            lambda: self._deepspeed(**inputs),
            lambda loss: self._deepspeed.backward(weighted(loss, scale * self._world.size), scale_wrt_gas=False),
        )
        return loss.detach()

    def update(self, lr: float) -> StepResult:
        """Clip, step with the given learning rate and clear the gradients; a non-finite gradient skips the step.

        Raises:
            TrainingError: fp16 overflows at its least loss scale; ranks used different parameters where DeepSpeed cannot add
                them up.
        """
        assert self._micro_steps_done == self._micro_steps, "update() before the last micro-step"
        self._micro_steps_done = 0
        agreed = self.usage.agree(self._world)
        if self._reduces_in_order:
            check_used_alike(agreed.partly, self._in_expert_blocks)
        self._steps.begin(agreed.unused, self.optimizer_step)
        self._forget_old_gradients()
        for group in self._zero.param_groups:
            group["lr"] = lr
        loss_scale = float(self._zero.loss_scale) if self._scales_loss else None
        self._deepspeed.step()
        applied = not self._zero.overflow
        if self._scales_loss:
            scaler.update(self._zero.loss_scaler, overflow=not applied)
        if not applied and self._stage < 3:
            forget_gradients(self._zero)
        if applied:
            self.optimizer_step += 1
            self.usage.stepped(agreed.unused)
        self._buffers.end_step(applied)
        norm = float(self._deepspeed.get_global_grad_norm())
        return StepResult(norm, applied, loss_scale, agreed.unused)

    def loss_and_input_gradients(self, batch: MicroBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A batch's loss and its derivatives by what the embedding gave; see `Engine.loss_and_input_gradients`."""
        self._learn_transform()
        inputs = model_inputs(batch, self._world.device, self.attention)

        def loss() -> torch.Tensor:
            # Not through DeepSpeed's engine, whose hooks take any backward for a training step's.
            with autocast_if_enabled(self._deepspeed):
                return cast(torch.Tensor, self.model(**inputs))

        with without_leaf_hooks(self.model), self._buffers.unchanged():
            result = loss_and_input_gradients(self.model, loss, self.activations)
        self._drop_recording()
        return result

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> tuple[torch.Tensor, int]:
        """Sum of token losses and number of target tokens of one micro-batch, without gradients or dropout."""
        self._learn_transform()
        self.model.eval()
        with self._buffers.unchanged():
            loss: torch.Tensor = self._deepspeed(**model_inputs(batch, self._world.device, self.attention))
        self.model.train()
        self._drop_recording()
        return loss, batch.num_target_tokens

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, context, vocabulary] of the model's own forward, one document a row."""
        self.model.eval()
        input_ids = input_ids.to(self._world.device)
        with self._buffers.unchanged():
            logits: torch.Tensor = self._deepspeed(input_ids=input_ids)
        self.model.train()
        self._drop_recording()
        return logits.float()

    def _drop_recording(self) -> None:
        """Keep a forward alone from being recorded as the order in which a step uses its parameters.

        DeepSpeed records the modules of its first pass to know what to prefetch and what to keep for backward. From a
        forward without backward it learns to keep nothing, and caches that (`__params_to_release`) for the whole run: each
        step then gathered those parameters twice (benchmarks/step_overhead.py found it).
        """
        if self._stage < 3:
            return
        settle(self._zero)
        coordinator = self._zero.parameter_offload.get_param_coordinator()
        if coordinator.is_record_trace():
            coordinator._invalidate_trace()

    def shards(self) -> Iterator[Shard]:
        """This rank's flat ranges in storage order; no communication."""
        return self._local.shards()

    def load_shards(self, reader: RangeReader) -> None:
        """Fill this rank's ranges from `reader`, each rank only its own, and the saved buffers."""
        self._local.load(reader)
        self._buffers.load(reader)
        if moments_in(reader, self._zero.optimizer):
            self.optimizer_step = reader.optimizer_step
            self.usage.load(reader)

    def replicas_between_steps(self) -> list[Replica]:
        """The model's buffers."""
        return self._buffers.replicas()

    def replicas_before_update(self) -> list[Replica]:
        """Whole parameters below stage 3; small ones that stay gathered, and hpZ's second copies, at stage 3."""
        return self._local.replicated()

    def saved_buffers(self) -> Mapping[str, torch.Tensor]:
        """Copies of the saved buffers by name, equal on all ranks."""
        return self._buffers.copies()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full float32 master tensors one by one, on every rank, in storage order."""
        for shard in self.shards():
            pieces = self._world.gather_tensor(shard.fp32)
            yield shard.name, torch.cat(pieces).reshape(shard.shape)

    def scaler_state(self) -> dict[str, float]:
        """Where fp16's dynamic loss scaling stands; empty without it."""
        return scaler.to_state(self._zero.loss_scaler) if self._scales_loss else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Go on where `scaler_state` was taken, by either engine."""
        if self._scales_loss:
            scaler.from_state(self._zero.loss_scaler, state)

    def write_native(self, folder: Path, tag: str, step: int, create: Callable[[Path], Sink]) -> None:
        """DeepSpeed's `save_checkpoint`. Every rank must call it."""
        save_native(self._deepspeed, folder, tag, step, create)

    def describe(self) -> dict[str, Any]:
        """Precision, sharding and optimizer, for the start's table and the manifest."""
        zero = self._zero
        is_offloaded = zero.offload_optimizer if self._stage == 3 else getattr(zero, "cpu_offload", False)
        return {
            "engine": "deepspeed",
            "deepspeed": deepspeed.__version__,
            "sharding": f"ZeRO-{self._stage} over {self._world.size} ranks{self._groups}",
            "optimizer": type(zero.optimizer).__name__,
            "optimizer_device": self._optimizer_on if is_offloaded else self._world.device.type,
            **asdict(real_precision(self._deepspeed, self.model)),
            "attention": self.attention,
            "activations": None if self.activations is None else str(self.activations),
            "kept_in_float32": kept_line(self._kept),
            "leaf_modules": ", ".join(leaf_class_names(self.model)) or None,
        }

    def close(self) -> None:
        """Let DeepSpeed release its hooks and buffers."""
        self._deepspeed.destroy()
        clear_placement(self._ds_json)
