"""The formats that need no template: `text`, of which all is learned, and `completion`, a prompt and its answer."""

from ds_recipes.data.formats.fields import learned, string
from ds_recipes.data.formats.identity import fingerprint_of
from ds_recipes.data.formats.remarks import unread
from ds_recipes.data.formats.sample import Parts
from ds_recipes.data.sources.record import Record
from ds_recipes.errors import InputError

BETWEEN_FIELDS = "\n\n"


class TextFormat:
    """{"text": ...}: all of it is learned. Several fields are joined with a blank line; an empty or null one is left out."""

    name = "text"
    splits_long = True
    joins_parts = False

    def __init__(self, fields: tuple[str, ...]) -> None:
        self.fields = fields
        self.fingerprint = fingerprint_of(self.name, *fields)

    def read(self, record: Record) -> Parts:
        if len(self.fields) == 1:
            return Parts(((learned(record, self.fields[0]), True),), unread(record.value, self.fields))
        texts = [text for field in self.fields if (text := _text_or_nothing(record, field))]
        if not texts:
            raise InputError(
                f"{record.where}: {' and '.join(repr(field) for field in self.fields)} are all empty, so the record has "
                "no target token. Fill one in or remove the record."
            )
        return Parts(((BETWEEN_FIELDS.join(texts), True),), unread(record.value, self.fields))


class CompletionFormat:
    """{"prompt": ..., "completion": ...}: the prompt, which may be empty, is read and the completion learned."""

    name = "completion"
    splits_long = False
    joins_parts = True
    fingerprint = fingerprint_of(name)

    def read(self, record: Record) -> Parts:
        prompt, completion = string(record, "prompt"), learned(record, "completion")
        return Parts(((prompt, False), (completion, True)), unread(record.value, ("prompt", "completion")))


def _text_or_nothing(record: Record, field: str) -> str:
    return "" if field in record.value and record.value[field] is None else string(record, field)
