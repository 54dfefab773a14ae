"""What a record means: which tokens the model learns to write, and which it only reads.

`remarks` are what a user should be told of the record.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ds_recipes.data.formats.remarks import Remark
from ds_recipes.data.sources.record import Record


@dataclass(frozen=True)
class Parts:
    """A document as texts in order, each learned (True) or only read (False).

    The parts are tokenised apart, so training sees exactly the tokens that a prompt has at inference. A begin-of-text
    token comes first where the tokenizer adds one, an end-of-text token comes last and is learned.
    """

    parts: tuple[tuple[str, bool], ...]
    remarks: tuple[Remark, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Rendered:
    """A document as one text that holds its own special tokens, with the character ranges [start, stop) that are learned.

    `ends_itself`: it ends with a token that ends a turn; otherwise an end-of-text token is put behind it and learned.
    """

    text: str
    targets: tuple[tuple[int, int], ...]
    ends_itself: bool
    remarks: tuple[Remark, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Tokens:
    """A document as token ids; those whose mask is True are learned. Nothing is added."""

    ids: Sequence[int]
    target_mask: Sequence[bool]
    remarks: tuple[Remark, ...] = field(default=(), compare=False)


Sample = Parts | Rendered | Tokens


@dataclass(frozen=True)
class FormatSettings:
    """What decides how records are read. Small and picklable: worker processes make their own format from it."""

    dataset: str = "text"  # text, alpaca, chat, completion, tokens, or path/to/file.py:function
    text_fields: tuple[str, ...] = ("text",)
    prompt_template: str | None = None  # a file, of alpaca
    chat_template: str | None = None  # a file, of chat
    chat_targets: str = "all"  # all, last


class Format(Protocol):
    """A way to read records."""

    name: str

    fingerprint: str
    """32 hex digits over everything that decides what a record becomes, the tokenizer apart."""

    splits_long: bool
    """Unless the user says otherwise: a document longer than a row goes on in the next ones (True), or its end is cut off."""

    joins_parts: bool
    """Documents can be made of several texts that are tokenised apart."""

    def read(self, record: Record) -> Sample | None:
        """What a record means; None leaves it out.

        Raises:
            InputError: it is not of this format; the message begins with file and line.
        """
        ...
