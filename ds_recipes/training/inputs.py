"""Reading what a run needs, with every check that comes before the model is built."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ds_recipes.checkpoint.export.pieces import plan_pieces
from ds_recipes.checkpoint.load import Found, check_same_model
from ds_recipes.config.hang_settings import START, TOKENISE
from ds_recipes.config.schema import Config
from ds_recipes.data.end_tokens import learned_ends
from ds_recipes.data.reading import Reading, read_corpora
from ds_recipes.data.tokenizer import add_tokens, check_special_ids, load_tokenizer, rows_for, use_eos
from ds_recipes.data.tokenizer_file import bos_note, loading_note
from ds_recipes.errors import CheckpointError, InputError
from ds_recipes.models.attention import choose_attention
from ds_recipes.models.end_tokens import EndTokens, find_end_tokens
from ds_recipes.models.load import ModelSource, find_model
from ds_recipes.models.skeleton import parameter_shapes, saved_buffers
from ds_recipes.models.vocabulary import rows_needed
from ds_recipes.training.model_files import check_tokenizer_comes_back, model_files
from ds_recipes.world.group import World


@dataclass(frozen=True)
class Model:
    """What of a run can be known without its data, checked."""

    source: ModelSource
    skeleton: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    notes: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each parameter and saved buffer."""
        buffers = {name: tuple(buffer.shape) for name, buffer in saved_buffers(self.skeleton).items()}
        return {**parameter_shapes(self.skeleton), **buffers}


@dataclass(frozen=True)
class Inputs(Model):
    """What a run reads, checked."""

    data: Reading
    ends: EndTokens


def read_model(config: Config, world: World, continued: Found | None) -> Model:
    """Find the model and its tokenizer, and refuse what can be refused before any data is read. Every rank must call it.

    `continued` is the checkpoint that the run goes on from; without one the weights are those of the model's folder.

    Raises:
        ConfigError, InputError, CheckpointError: on all ranks.
    """
    named = find_model(
        world,
        config.model.model_name,
        config.model.model_config,
        config.run.seed,
        config.model.trust_remote_code,
        part=config.model.model_part,
    )
    attention = world.check("attention", lambda: choose_attention(config, world.device, named))
    world.check("context size", lambda: _check_context(config, named))
    tokenizer = world.check("tokenizer", lambda: read_tokenizer(config))
    found, in_files = world.check("weights", lambda: _as_it_lies(config, named, continued))
    source, notes = world.check("vocabulary", lambda: fit_vocabulary(config, found, tokenizer))
    skeleton = world.check("model", lambda: source.skeleton(torch.float32, attention, torch.device("cpu")))
    world.check("export", lambda: _check_export(skeleton) if world.rank == 0 else None)
    world.check("exported tokenizer", lambda: _check_tokenizer(config, world, source, skeleton, tokenizer))
    model = Model(source, skeleton, tokenizer, (*in_files, *notes))
    if continued is not None:
        where = str(continued.path)
        world.check("resume", lambda: check_same_model(continued.manifest, model.shapes, where))
    return model


def _as_it_lies(config: Config, source: ModelSource, continued: Found | None) -> tuple[ModelSource, tuple[str, ...]]:
    """The model as its folder has it, or, in a run that continues, as the checkpoint does: the folder may be gone by then."""
    if continued is None:
        return source.settled(config.model.allow_unused_weights)
    apart = [name for name in source.ties() if name in continued.manifest.parameters]
    return (source.untied(apart) if apart else source), ()


def _check_export(skeleton: PreTrainedModel) -> None:
    """Refuse a model that would be trained and could not be exported afterwards."""
    try:
        plan_pieces(skeleton, parameter_shapes(skeleton))
    except CheckpointError as error:
        raise InputError(
            f"{error}. No checkpoint of this run could become a Hugging Face model, so it is not begun."
        ) from error


def read_inputs(config: Config, world: World, model: Model, say: Callable[[str], None]) -> Inputs:
    """Tokenise and pack the data. Every rank must call it."""
    world.doing("reading the data", TOKENISE)
    data = read_corpora(config, model.tokenizer, model.source.vocabulary_size, world, say)
    world.doing("reading the data is done", START)
    world.check("chat template", lambda: _keep_chat_template(config, model.tokenizer))
    ends = world.check("end tokens", lambda: _end_tokens(model.source, data, model.tokenizer))
    note = ends.note(model.tokenizer)
    notes = (*model.notes, *([note] if note else []))
    return Inputs(model.source, model.skeleton, model.tokenizer, notes, data, ends)


def read_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The run's tokenizer, with the tokens that the settings add.

    Raises:
        InputError: it cannot be loaded, or a token cannot be added.
    """
    name = config.model.tokenizer_name or config.model.model_name or ""
    tokenizer = load_tokenizer(name, config.model.trust_remote_code, config.model.eos_token)
    add_tokens(tokenizer, config.model.added_tokens, config.model.added_plain_tokens)
    if config.model.eos_token is not None:
        use_eos(tokenizer, config.model.eos_token)
    return tokenizer


def fit_vocabulary(
    config: Config, source: ModelSource, tokenizer: PreTrainedTokenizerBase
) -> tuple[ModelSource, tuple[str, ...]]:
    """The model with an embedding that holds the added tokens, padded as asked; and what the user should know.

    Raises:
        InputError: a special token's id has no row, or the model's vocabulary cannot grow.
    """
    model = config.model
    notes = [note for note in (loading_note(tokenizer), bos_note(tokenizer)) if note]
    if model.added_tokens or model.added_plain_tokens or model.pad_vocabulary_to is not None:
        rows = rows_needed(rows_for(tokenizer), source.vocabulary_size, model.pad_vocabulary_to)
        if rows != source.vocabulary_size:
            notes.append(
                f"the embedding grows from {source.vocabulary_size:,} to {rows:,} rows for {len(tokenizer):,} tokens; new rows: "
                f"{model.new_token_init}"
            )
            source = source.resized(rows, model.new_token_init)
    check_special_ids(tokenizer, source.vocabulary_size)
    return source, tuple(notes)


def _end_tokens(source: ModelSource, data: Reading, tokenizer: PreTrainedTokenizerBase) -> EndTokens:
    return find_end_tokens(source.config_copy(), source.folder, learned_ends(data.corpus, tokenizer))


def _check_tokenizer(
    config: Config, world: World, source: ModelSource, skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """See that what the run saves is loaded with the tokens that it trains on.

    That is open where transformers would have loaded the tokenizer otherwise, or it is not the one of this model.
    """
    is_open = loading_note(tokenizer) is not None or config.model.tokenizer_name is not None
    if is_open and world.rank == 0:
        ends = find_end_tokens(source.config_copy(), source.folder, ())  # what the data teach is not known yet
        check_tokenizer_comes_back(model_files(source, skeleton, tokenizer, ends), tokenizer, source.trust_remote_code)


def _keep_chat_template(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let checkpoints and exports carry the template that was trained with."""
    if config.data.chat_template is not None:
        tokenizer.chat_template = Path(config.data.chat_template).read_text(encoding="utf-8-sig")


def _check_context(config: Config, source: ModelSource) -> None:
    positions = getattr(source.hf_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < config.data.context_size:  # XLNet's -1: as many as one likes
        raise InputError(
            f"--context_size {config.data.context_size}: the model has {positions} positions (max_position_embeddings in "
            f"its config). Set context_size to {positions} or less."
        )
