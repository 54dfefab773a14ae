"""One ZeRO-3 step of a tiny model on the engine that trains, held against plain torch in one process."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import Config
from ds_recipes.data.batch import MicroBatch, one_document
from ds_recipes.engine.create import create_engine
from ds_recipes.models.load import ModelSource
from ds_recipes.world.group import World

VOCABULARY, CONTEXT, LR, SEED = 259, 32, 1e-2, 11
TOLERANCE = 1e-4
"""Nats a token. Float32 sums in another order differ by 1e-6; a rank whose share is lost changes the loss by far more."""


def take_step(world: World) -> dict[str, Any]:
    """Losses before and after one step on `world.size` rows, of the engine and of plain torch, and the step's seconds.

    Every rank must call it, and gets the same numbers.
    """
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        config = _settings(Path(folder), world.size)
        source = ModelSource(_shape(), None, SEED, False)
        rows = [one_document(_row(rank)) for rank in range(world.size)]
        engine = create_engine(config, make_plan(config, world.size), source, world)
        engine.load_shards(source.initial_weights(world.device))
        targets = sum(row.num_target_tokens for row in rows)
        began = time.monotonic()
        (before,) = world.sum([float(engine.backward(rows[world.rank], 1 / targets)) / targets])
        result = engine.update(LR)
        seconds = time.monotonic() - began
        (after,) = world.sum([float(engine.evaluate(rows[world.rank])[0]) / targets])
        engine.close()
    expected_before, expected_norm, expected_after = _plain(source, rows, config, world.device)
    return {
        "loss_before": before,
        "loss_after": after,
        "gradient_norm": result.grad_norm,
        "expected_before": expected_before,
        "expected_after": expected_after,
        "expected_norm": expected_norm,
        "tolerance": TOLERANCE,
        "right": result.applied
        and math.isclose(before, expected_before, abs_tol=TOLERANCE)
        and math.isclose(result.grad_norm, expected_norm, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        and math.isclose(after, expected_after, abs_tol=10 * TOLERANCE),
        "seconds": seconds,
    }


def _shape() -> LlamaConfig:
    """Odd sizes, so that parameters divide evenly over few numbers of ranks."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=60,
        intermediate_size=97,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=CONTEXT,
    )


def _settings(folder: Path, ranks: int) -> Config:
    return load_config(
        [
            *("--save_checkpoint_path", str(folder), "--train_data", "unused", "--model_config", "unused"),
            *("--tokenizer_name", "unused", "--context_size", str(CONTEXT), "--max_steps", "2", "--precision", "fp32"),
            *(
                "--global_batch_size",
                str(ranks),
                "--max_grad_norm",
                "0",
                "--optimizer_type",
                "sgd",
                "--weight_decay",
                "0",
            ),
        ]
    )


def _row(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED + rank)
    return torch.randint(0, VOCABULARY, (1, CONTEXT), generator=generator)  # [1, context]


def _plain(
    source: ModelSource, rows: list[MicroBatch], config: Config, device: torch.device
) -> tuple[float, float, float]:
    """Loss before, gradient norm and loss after the same step in this process alone."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        source.config_copy(), dtype=torch.float32, attn_implementation="sdpa"
    ).to(device)
    reader = source.initial_weights(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            reader.read_into("fp32", name, 0, parameter.view(-1))
    tokens = torch.cat([row.input_ids for row in rows]).to(device)  # [ranks, context]

    def loss() -> torch.Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # [ranks, context - 1, vocabulary]
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    before = loss()
    before.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).double().norm().item()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(LR * parameter.grad)
        return before.item(), norm, loss().item()
