"""Checkpoints as a program with plain DeepSpeed writes them, and what DeepSpeed itself says that is in them."""

import argparse
import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_recipes.world.group import World


@dataclass(frozen=True)
class Plain:
    """One way to train and save. `groups`: of the optimizer's parameters; `frozen`: the first layer does not train."""

    stage: int
    bf16: bool = False
    tied: bool = False
    groups: int = 1
    frozen: bool = False
    exclude_frozen: bool = False
    steps: int = 2
    zero: tuple[tuple[str, Any], ...] = ()
    top: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        said = [name for name in ("bf16", "tied", "frozen", "exclude_frozen") if getattr(self, name)]
        extra = [name for name, _ in (*self.zero, *self.top)]
        return "-".join([f"stage{self.stage}", *said, f"groups{self.groups}", f"steps{self.steps}", *extra])

    @property
    def json(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 200, **dict(self.zero)},
            "bf16": {"enabled": self.bf16},
            "zero_allow_untested_optimizer": True,
            **dict(self.top),
        }


def model_of(plain: Plain) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=20,
        intermediate_size=23,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=plain.tied,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.model.layers[0].parameters() if plain.frozen else ():
        parameter.requires_grad = False
    return model


def engine_of(plain: Plain) -> Any:
    import deepspeed

    model = model_of(plain)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained[number :: plain.groups]} for number in range(plain.groups)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=plain.json, dist_init_required=False)
    return engine


def save_all(world: World, folder: str, cases: Sequence[Plain]) -> None:
    """Train each case for its steps and save it; rank 0 adds what DeepSpeed finds in it."""
    for plain in cases:
        home = Path(folder) / str(plain)
        engine = engine_of(plain)
        generator = torch.Generator().manual_seed(world.rank)
        for _ in range(plain.steps):
            rows = torch.randint(0, 37, (1, 12), generator=generator)
            engine.backward(engine(input_ids=rows, labels=rows).loss)
            engine.step()
        engine.save_checkpoint(str(home), exclude_frozen_parameters=plain.exclude_frozen)
        if world.rank == 0:
            torch.save(consolidated(home), home / "expected.pt")
        engine.destroy()
        world.barrier("checkpoint made")


def consolidated(home: Path) -> dict[str, torch.Tensor] | None:
    """DeepSpeed's own reading; None where it refuses."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        try:
            found: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(home))
        except (ValueError, TypeError):
            return None
    return found


def to_universal(home: Path) -> Path | None:
    """DeepSpeed's own conversion, into a folder beside; None where it refuses."""
    from deepspeed.checkpoint import ds_to_universal

    source = next(home.glob("global_step*"))
    target = home / "converted" / f"{source.name}_universal"
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        ds_to_universal.main(arguments)
    return target
