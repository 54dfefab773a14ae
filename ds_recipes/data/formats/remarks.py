"""What a user should be told of the records that are used: fields that nothing reads, nulls that only a table has, and tokens
that begin or end a text twice.

A sample carries its record's remarks; they are counted while tokenising, kept in the store, and told once a source.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ds_recipes.data.sources.messages import quoted

UNREAD, NULLS, TWICE = "unread", "nulls", "twice"
"""Kinds of remarks."""

SENTENCES = {
    UNREAD: "fields that nothing reads: {} (docs/formats.md says what each format reads)",
    NULLS: "fields that are null in some rows and set in others were left out where they are null, as in JSON Lines: {}",
    TWICE: "tokens that begin or end a text stand twice in a row: {}. The records, or the template, spell what is added anyway "
    "(docs/formats.md): remove it there",
}

Remark = tuple[str, str]
"""A kind, and the field: `history`, or `messages.name` within a list; or the token."""

Counts = Sequence[tuple[str, str, int]]
"""Kind, field, and in how many records."""

MOST_FIELDS = 100
"""Counted of each part: records whose field names are data have any number of them."""

SHOWN_FIELDS = 10


def unread(value: Mapping[str, Any], read: Collection[str]) -> tuple[Remark, ...]:
    """Remarks on the fields of a record that are not in `read`; one that is null or empty says nothing."""
    if len(value) == 1 and next(iter(value)) in read:
        return ()
    return tuple((UNREAD, str(name)) for name in value if name not in read and not is_blank(value[name]))


def is_blank(value: Any) -> bool:
    """True for null, and for an empty string, array or object."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def counted(remarks: Mapping[Remark, int]) -> Counts:
    """The most frequent remarks."""
    most = Counter(remarks).most_common(MOST_FIELDS)
    return tuple((kind, field, count) for (kind, field), count in most)


def joined(counts: Iterable[Counts]) -> Counts:
    """Remarks on all parts of a source."""
    total: Counter[Remark] = Counter()
    for part in counts:
        total.update({(kind, field): count for kind, field, count in part})
    return counted(total)


def lines(counts: Counts) -> list[str]:
    """A line for each kind of remarks."""
    found = []
    for kind, sentence in SENTENCES.items():
        fields = [(field, count) for one, field, count in counts if one == kind]
        named = [f"{quoted(field)} ({count:,} record{'s' * (count != 1)})" for field, count in fields[:SHOWN_FIELDS]]
        more = [f"{len(fields) - SHOWN_FIELDS:,} more"] if len(fields) > SHOWN_FIELDS else []
        if fields:
            found.append(sentence.format(", ".join([*named, *more])))
    return found
