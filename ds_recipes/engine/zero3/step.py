"""The step under ZeRO-3, with DeepSpeed's own averaging undone so that the loop's loss convention holds."""

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from transformers import PreTrainedModel

from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import OptimizerConfig
from ds_recipes.data.batch import MicroBatch
from ds_recipes.engine.base import Engine, Shard, StepResult
from ds_recipes.engine.inputs import model_inputs
from ds_recipes.engine.zero3.build import make_optimizer, shard_model, share_offloaded_gradients, start_deepspeed
from ds_recipes.engine.zero3.local_state import LocalState
from ds_recipes.models.skeleton import parameter_shapes
from ds_recipes.ranges import RangeReader
from ds_recipes.world.group import World


class Zero3Engine(Engine):
    """ZeRO-3 with torch's AdamW or SGD, with or without CPU offload of the optimizer."""

    def __init__(
        self,
        skeleton: PreTrainedModel,
        world: World,
        plan: Plan,
        ds_json: dict[str, Any],
        optimizer: OptimizerConfig,
        activation_checkpointing: bool,
    ) -> None:
        self._world = world
        self._micro_steps = plan.micro_steps
        self._micro_steps_done = 0
        self._attention = skeleton.config._attn_implementation
        shapes = parameter_shapes(skeleton)
        shard_model(skeleton, ds_json, activation_checkpointing)
        self.model = skeleton
        torch_optimizer = make_optimizer(skeleton, shapes, optimizer)
        self._deepspeed = start_deepspeed(skeleton, torch_optimizer, ds_json)
        self._zero = self._deepspeed.optimizer
        share_offloaded_gradients(self._zero)
        names = {id(parameter): name for name, parameter in skeleton.named_parameters()}
        self._local = LocalState(self._zero, names, world.rank)
        self.optimizer_step = 0

    def backward(self, batch: MicroBatch, scale: float) -> torch.Tensor:
        """Add the gradient of `scale` x (sum of token losses); return that sum, a scalar on the device.

        DeepSpeed divides gradients by the number of ranks; multiplying the loss by it makes the sum over ranks whole.
        """
        self._micro_steps_done += 1
        self._deepspeed.set_gradient_accumulation_boundary(self._micro_steps_done == self._micro_steps)
        loss: torch.Tensor = self._deepspeed(**model_inputs(batch, self._world.device, self._attention))
        self._deepspeed.backward(loss * (scale * self._world.size), scale_wrt_gas=False)
        return loss.detach()

    def update(self, lr: float) -> StepResult:
        """Clip, step with the given learning rate and clear the gradients; a non-finite gradient skips the step."""
        assert self._micro_steps_done == self._micro_steps, "update() before the last micro-step"
        self._micro_steps_done = 0
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        applied = not self._zero.overflow
        self.optimizer_step += applied
        return StepResult(grad_norm=float(self._deepspeed.get_global_grad_norm()), applied=applied)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> tuple[torch.Tensor, int]:
        """Sum of token losses and number of target tokens of one micro-batch, without gradients or dropout."""
        self.model.eval()
        loss: torch.Tensor = self._deepspeed(**model_inputs(batch, self._world.device, self._attention))
        self.model.train()
        self._drop_recording()
        return loss, batch.num_target_tokens

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, context, vocabulary] of the model's own forward, one document a row."""
        self.model.eval()
        input_ids = input_ids.to(self._world.device)
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        logits: torch.Tensor = self._deepspeed(input_ids=input_ids, position_ids=position_ids)
        self.model.train()
        self._drop_recording()
        return logits.float()

    def _drop_recording(self) -> None:
        """Keep a forward alone from being recorded as the order in which a step uses its parameters.

        DeepSpeed records the modules of its first pass to know what to prefetch and what to keep for backward. From a
        forward without backward it learns to keep nothing, and caches that (`__params_to_release`) for the whole run: each
        step then gathered those parameters twice (benchmarks/step_overhead.py found it).
        """
        coordinator = self._zero.parameter_offload.get_param_coordinator()
        if coordinator.is_record_trace():
            coordinator._invalidate_trace()

    def shards(self) -> Iterator[Shard]:
        """This rank's flat ranges in storage order; no communication."""
        return self._local.shards()

    def load_shards(self, reader: RangeReader) -> None:
        """Fill this rank's ranges from `reader`; each rank reads only its own."""
        self._local.load(reader)
        if reader.has("exp_avg"):
            self.optimizer_step = reader.optimizer_step

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full float32 master tensors one by one, on every rank, in storage order."""
        for shard in self.shards():
            pieces = self._world.gather_tensor(shard.fp32)
            yield shard.name, torch.cat(pieces).reshape(shard.shape)

    def describe(self) -> dict[str, Any]:
        """Precision, sharding and optimizer, for the start's table and the manifest."""
        zero = self._zero
        parameter_dtype = next(iter(self.model.parameters())).dtype
        return {
            "engine": "deepspeed",
            "deepspeed": deepspeed.__version__,
            "sharding": f"ZeRO-3 over {self._world.size} ranks",
            "optimizer": type(zero.optimizer).__name__,
            "optimizer_device": "cpu" if zero.offload_optimizer else self._world.device.type,
            "parameters": _name(parameter_dtype),
            "master": _name(zero.fp32_partitioned_groups_flat[0].dtype),
            "moments": _name(zero.fp32_partitioned_groups_flat[0].dtype),
            "gradient_accumulation": _name(zero.gradient_accumulation_dtype),
            "reduction": _name(zero.communication_data_type),
            "attention": self._attention,
        }

    def close(self) -> None:
        """Let DeepSpeed release its hooks and buffers."""
        self._deepspeed.destroy()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
