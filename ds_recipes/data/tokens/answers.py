"""What comes of a part that a process was asked to make, and how far it is meanwhile."""

from dataclasses import dataclass

from ds_recipes.data.tokens.parts import PartFacts


@dataclass(frozen=True)
class Made:
    """The part is there."""

    part: int
    facts: PartFacts


@dataclass(frozen=True)
class Wrong:
    """The part holds a record that cannot be used; the message is about the first of them."""

    part: int
    message: str


@dataclass(frozen=True)
class Failed:
    """The part could not be made. `for_user`: the text is a message; otherwise it is a traceback."""

    part: int
    text: str
    for_user: bool


@dataclass(frozen=True)
class Advanced:
    """The part is still in work. So many of its source bytes are tokenised."""

    part: int
    source_bytes: int


Answer = Made | Wrong | Failed
