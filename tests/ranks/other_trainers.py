"""Hugging Face's Trainer and Accelerate on real ranks with DeepSpeed, each leaving a checkpoint as users have them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.ranks.plain_deepspeed import Plain, model_of

PLAIN = Plain(3, tied=True)
STEPS = 2


def ds_json(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }


def train_with_each(argv: Sequence[str]) -> int:
    """What a rank does; `argv` is the folder."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    folder = Path(argv[0])
    with_trainer(folder / "trainer")
    with_accelerate(folder / "accelerate")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def with_trainer(folder: Path) -> None:
    """LoRA on a model under ZeRO-3, saved by the Trainer, with what it computes in the end."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    settings = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=1,
        deepspeed=ds_json(3),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch",
        max_grad_norm=0.0,
    )
    model = get_peft_model(model_of(PLAIN), settings)
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(24).reshape(4, 6)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    note_logits(trainer.model_wrapped, folder)


def with_accelerate(folder: Path) -> None:
    """A whole model under ZeRO-2, saved by `save_state`."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch` sets it
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_json(2)))
    model = model_of(PLAIN)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for step in range(STEPS):
        rows = (torch.arange(6)[None] + step) % 37
        accelerator.backward(model(input_ids=rows, labels=rows).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder))
    note_logits(model, folder)


def note_logits(model: Any, folder: Path) -> None:
    with torch.no_grad():
        logits = model(input_ids=torch.arange(6)[None]).logits
    if torch.distributed.get_rank() == 0:
        (folder / "logits.json").write_text(json.dumps(logits[0].float().tolist()))
