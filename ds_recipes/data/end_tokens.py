"""Which tokens a run's data teach a model to end its answers with."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_recipes.data.corpus import Corpus
from ds_recipes.data.tokens.documents import Documents

SAMPLED_DOCUMENTS = 500
"""Documents of a source that are looked at, evenly spread over it."""

LEAST_SHARE = 0.01
"""Of the learned stretches, at least so many end with a token that counts; fewer are cut texts."""


def learned_ends(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of the tokens that end what is learned of a document, the most frequent first.

    The tokenizer's EOS counts, and so does any other added token that ends learned stretches and never stands within one:
    a model that has written it goes on with nothing that was learned. `</think>` and the like are followed by an answer.
    """
    added = set(tokenizer.added_tokens_decoder)
    ends: Counter[int] = Counter()
    within: set[int] = set()
    for ids in _stretches(corpus):
        ends[ids[-1]] += 1
        within |= added.intersection(ids[:-1])
    least = LEAST_SHARE * ends.total()
    return tuple(
        token
        for token, count in ends.most_common()
        if count >= least and (token == tokenizer.eos_token_id or (token in added and token not in within))
    )


def _stretches(corpus: Corpus) -> Iterator[list[int]]:
    """The learned stretches of some documents as token ids, none empty."""
    for source in corpus.sources:
        documents = source.documents
        chosen = np.linspace(0, len(documents) - 1, min(SAMPLED_DOCUMENTS, len(documents))).astype(int)
        for document in np.unique(chosen).tolist():
            yield from _learned(documents, document)


def _learned(documents: Documents, document: int) -> Iterator[list[int]]:
    tokens = documents.tokens(document)
    for start, stop in documents.spans_of(document).tolist():
        if start < stop:
            yield tokens[start:stop].tolist()
