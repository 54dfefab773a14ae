"""The barest DeepSpeed loop that trains a Hugging Face model under ZeRO-3, to compare ours with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM

from ds_recipes.config.schema import OptimizerConfig
from ds_recipes.data.batch import MicroBatch
from ds_recipes.engine.inputs import PROBE_IDS
from ds_recipes.models.loss_head import install_loss_head, learn_transform

NO_TARGET = -100  # transformers' label of a position without a loss


class BareLoop:
    """Forward, backward, step, and nothing else. `losses` are those of each step."""

    def __init__(self, folder: Path, ds_json: dict[str, Any], settings: OptimizerConfig, our_loss: bool) -> None:
        self.losses: list[float] = []
        self._our_loss = our_loss
        self._step_losses: list[torch.Tensor] = []
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        if our_loss:
            install_loss_head(model)
            learn_transform(model, lambda: model(PROBE_IDS, torch.arange(PROBE_IDS.shape[1])[None]))
        model.train()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(ds_json), dist_init_required=False
        )

    def prepared(self, steps: Sequence[Sequence[MicroBatch]]) -> list[list[dict[str, Any]]]:
        """The model's arguments for each micro-step of these steps."""
        inputs = _for_our_loss if self._our_loss else _with_labels
        return [[inputs(batch) for batch in step] for step in steps]

    def train(self, steps: Sequence[Sequence[dict[str, Any]]]) -> None:
        """The loop. All of it is timed."""
        for step in steps:
            for inputs in step:
                if self._our_loss:
                    loss = self._engine(**inputs) / inputs["target_ids"].numel()
                else:
                    loss = self._engine(**inputs, use_cache=False).loss
                self._engine.backward(loss)
                self._engine.step()
            self._step_losses.append(loss.detach())

    def note_losses(self) -> None:
        """Turn the losses since the last call into means over the ranks; not timed."""
        losses = torch.stack(self._step_losses)  # [steps]
        torch.distributed.all_reduce(losses)
        self.losses += (losses / torch.distributed.get_world_size()).tolist()
        self._step_losses.clear()


def _for_our_loss(batch: MicroBatch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "target_index": batch.target_index,
        "target_ids": batch.target_ids,
    }


def _with_labels(batch: MicroBatch) -> dict[str, Any]:
    """Labels as transformers takes them: it shifts them itself, so a target at the end of a row falls away."""
    context = batch.input_ids.shape[1]
    labels = torch.full((batch.input_ids.numel(),), NO_TARGET)  # [rows * context]
    inside = batch.target_index % context < context - 1
    labels[batch.target_index[inside] + 1] = batch.target_ids[inside]
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "labels": labels.view_as(batch.input_ids),
    }
