"""From a run's settings to its training and validation rows: every source opened, tokenised where it has to be, packed."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from ds_recipes.config.data_paths import DataPath, parse_data_path
from ds_recipes.config.schema import Config
from ds_recipes.data.corpus import Corpus
from ds_recipes.data.formats.choose import make_format
from ds_recipes.data.formats.sample import Format, FormatSettings
from ds_recipes.data.rows import Layout, Side, build_rows
from ds_recipes.data.tokens.documents import Documents
from ds_recipes.data.tokens.store import Recipe, open_documents
from ds_recipes.world.group import World

MOST_WORKERS = 16
FALLBACK_CACHE = "data_cache"  # below the run folder

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reading:
    """The rows of a run, and what of the settings' consequences its identity depends on."""

    corpus: Corpus
    validation: Corpus | None
    tokenizer_fingerprint: str
    format_fingerprint: str
    tokens_version: str
    long_documents: str  # what becomes of them: split, truncate, drop or error


def _format_settings(config: Config) -> FormatSettings:
    """The part of the settings that says what records mean."""
    data = config.data
    return FormatSettings(
        data.dataset, tuple(data.text_fields), data.prompt_template, data.chat_template, data.chat_targets
    )


def read_corpora(
    config: Config, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, world: World, say: Say
) -> Reading:
    """The rows to train on, and those to validate on if the run does. Every rank must call it.

    Documents that are in `validation_data`, or on the held-out side of `validation_split`, are in no training row.

    Raises:
        InputError: on all ranks, naming file and line.
    """
    train_paths = [parse_data_path(text) for text in config.data.train_data]
    validation_paths = [parse_data_path(text) for text in config.data.validation_data]
    recipe = _recipe(config, tokenizer, vocabulary_size, world)
    record_format = world.check("format", lambda: make_format(recipe.format, tokenizer))  # before anything is read
    layout = Layout(
        packing=config.data.packing,
        context_size=config.data.context_size,
        long_documents=_long_documents(config, record_format),
        skip_bad=recipe.skip_bad,
        padding_id=int(tokenizer.eos_token_id),
    )
    train = _open_all(train_paths, recipe, world, say)
    validates = config.evaluation.run_validation
    validation = _open_all(validation_paths, recipe, world, say) if validates else []
    fraction = config.data.validation_split
    side = Side(fraction) if fraction is not None else _all_but(validation)
    weights = [path.weight for path in train_paths if path.weight is not None] or None

    rows = [build_rows(documents, layout, side, world) for documents in train]
    corpus = world.check("training data", lambda: Corpus(rows, weights, config.run.seed, "training"))
    if fraction is not None and validates:
        rows = [build_rows(documents, layout, Side(fraction, held_out=True), world) for documents in train]
    elif validation:
        rows = [build_rows(documents, layout, Side(), world) for documents in validation]
    else:
        rows = []
    held_out_corpus = world.check(
        "validation data", lambda: Corpus(rows, None, config.run.seed, "validation") if rows else None
    )
    return Reading(
        corpus=corpus,
        validation=held_out_corpus,
        tokenizer_fingerprint=recipe.tokenizer_fingerprint,
        format_fingerprint=record_format.fingerprint,
        tokens_version=recipe.version_for(record_format),
        long_documents=layout.long_documents,
    )


def _recipe(config: Config, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, world: World) -> Recipe:
    data = config.data
    run_folder = config.checkpoint.save_checkpoint_path
    return Recipe(
        format=_format_settings(config),
        tokenizer=tokenizer,
        vocabulary_size=vocabulary_size,
        skip_bad=data.bad_records == "skip",
        streaming=data.streaming,
        workers=_workers(config, world),
        cache=None if data.data_cache is None else Path(data.data_cache),
        fallback_cache=None if run_folder is None else Path(run_folder) / FALLBACK_CACHE,
    )


def _workers(config: Config, world: World) -> int:
    if config.data.num_workers_tokenise is not None:
        return config.data.num_workers_tokenise
    ranks_here = world.hosts.count(world.hosts[world.rank])
    return max(1, min(len(os.sched_getaffinity(0)) // ranks_here, MOST_WORKERS))


def _long_documents(config: Config, record_format: Format) -> str:
    """What becomes of documents longer than a row: split, truncate, drop or error."""
    by_format = "split" if record_format.splits_long else "truncate"
    return "split" if config.data.packing == "concat" else config.data.truncation or by_format


def _open_all(paths: Sequence[DataPath], recipe: Recipe, world: World, say: Say) -> list[Documents]:
    return [open_documents(path, recipe, world, say) for path in paths]


def _all_but(validation: Sequence[Documents]) -> Side:
    """Everything whose content is not in the validation data."""
    if not validation:
        return Side()
    names = ",".join(documents.fingerprint for documents in validation)
    excluded = np.unique(np.concatenate([documents.hashes for documents in validation]))
    return Side(excluded=excluded, excluded_by=str(xxhash.xxh3_128(names.encode()).hexdigest()))
