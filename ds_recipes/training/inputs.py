"""Reading what a run needs, with every check that comes before the model is built."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ds_recipes.config.schema import Config
from ds_recipes.data.dataset import PackedDataset, build_dataset
from ds_recipes.data.tokenizer import load_tokenizer
from ds_recipes.errors import InputError
from ds_recipes.models.load import ModelSource, find_model
from ds_recipes.world.group import World


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked."""

    source: ModelSource
    skeleton: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dataset: PackedDataset
    validation: PackedDataset | None


def read_inputs(config: Config, world: World) -> Inputs:
    """Find the model, load the tokenizer, tokenise and pack the data. Every rank must call it."""
    source = find_model(
        world, config.model.model_name, config.model.model_config, config.run.seed, config.model.trust_remote_code
    )
    world.check("context size", lambda: _check_context(config, source))
    name = config.model.tokenizer_name or config.model.model_name or ""
    tokenizer = world.check("tokenizer", lambda: load_tokenizer(name, config.model.trust_remote_code))
    skeleton = world.check("model", lambda: source.skeleton(torch.float32, "eager", torch.device("cpu")))

    def read(paths: tuple[str, ...]) -> PackedDataset:
        return build_dataset(
            paths=[Path(path) for path in paths],
            dataset_format=config.data.dataset,
            packing=config.data.packing,
            context_size=config.data.context_size,
            tokenizer=tokenizer,
            vocabulary_size=source.vocabulary_size,
            world=world,
        )

    validates = config.evaluation.run_validation and config.data.validation_data
    dataset = read(config.data.train_data)
    return Inputs(source, skeleton, tokenizer, dataset, read(config.data.validation_data) if validates else None)


def _check_context(config: Config, source: ModelSource) -> None:
    positions = getattr(source.hf_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.data.context_size > positions:
        raise InputError(
            f"--context_size {config.data.context_size}: the model has {positions} positions (max_position_embeddings in "
            f"its config). Set context_size to {positions} or less."
        )
