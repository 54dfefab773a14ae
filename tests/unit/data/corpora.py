"""Corpora over small files, tokenised with the tiny tokenizer, and the parts of a plan that a stream reads."""

import dataclasses
from pathlib import Path
from typing import Any

from ds_recipes.config.data_paths import parse_data_path
from ds_recipes.config.plan import Plan
from ds_recipes.data.corpus import Corpus
from ds_recipes.data.dataset import PackedDataset
from ds_recipes.data.formats.sample import FormatSettings
from ds_recipes.data.rows import Layout, Side, build_rows
from ds_recipes.data.tokens.documents import Documents
from ds_recipes.data.tokens.store import Recipe, open_documents
from ds_recipes.world.group import solo
from tests.unit.data.made import make_tokenizer

SEED = 5


def open_one(path: Path | str, dataset: str = "text", **recipe: Any) -> Documents:
    tokenizer = make_tokenizer()
    settings: dict[str, Any] = {
        "format": FormatSettings(dataset),
        "tokenizer": tokenizer,
        "vocabulary_size": len(tokenizer),
        "skip_bad": False,
        "streaming": False,
        "workers": 0,
        "cache": None,
        "fallback_cache": None,
    }
    return open_documents(parse_data_path(str(path)), Recipe(**settings | recipe), solo(), lambda line: None)


def rows_of(
    path: Path | str,
    dataset: str = "text",
    packing: str = "documents",
    context_size: int = 32,
    long_documents: str | None = None,
    side: Side | None = None,
    **recipe: Any,
) -> PackedDataset:
    documents = open_one(path, dataset, **recipe)
    by_format = "split" if dataset == "text" or packing == "concat" else "truncate"
    skip_bad = bool(recipe.get("skip_bad", False))
    layout = Layout(packing, context_size, long_documents or by_format, skip_bad, make_tokenizer().eos_token_id)
    return build_rows(documents, layout, side or Side(), solo())


def corpus_of(*sources: PackedDataset, weights: tuple[float, ...] | None = None, seed: int = SEED) -> Corpus:
    return Corpus(sources, weights, seed)


def totals(corpus: Corpus) -> tuple[int, int, int]:
    """Tokens, target tokens and documents of all rows."""
    facts = [source.facts for source in corpus.sources]
    return sum(f.tokens for f in facts), sum(f.target_tokens for f in facts), sum(f.documents for f in facts)


def make_plan(world_size: int, rows_per_rank: int, micro_steps: int, total_rows: int | None = None) -> Plan:
    """The parts of a plan that a stream reads."""
    values: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Plan))
    return Plan(
        **values
        | {
            "world_size": world_size,
            "rows_per_rank": rows_per_rank,
            "micro_steps": micro_steps,
            "global_rows": world_size * rows_per_rank * micro_steps,
            "total_rows": total_rows,
        }
    )
