"""What messages about bad data have in common: they show a little of what was found, however much there is."""

from collections.abc import Iterable

SHOWN_CHARACTERS = 80
SHOWN_NAMES = 8
MB = 1_000_000


class NotARecord(Exception):
    """An entry is no record: what was found, what to do, and on which of the entry's lines (from 0).

    `counts`: the message also says how many records before it are fine.
    """

    def __init__(self, found: str, advice: str, line: int = 0, counts: bool = False) -> None:
        super().__init__(found)
        self.found, self.advice, self.line, self.counts = found, advice, line, counts


def not_utf8(error: UnicodeDecodeError, unit: str, counts: bool = True) -> NotARecord:
    """What to raise for an entry (a "line", a "row") that could not be decoded."""
    byte = error.object[error.start]
    return NotARecord(
        f"not UTF-8 (byte 0x{byte:02x} at byte {error.start + 1:,} of the {unit}).",
        f"Convert the file to UTF-8, or remove the {unit}.",
        error.object.count(b"\n", 0, error.start),
        counts,
    )


def quoted(text: str, keep_end: bool = False, most: int = SHOWN_CHARACTERS) -> str:
    """The text as Python writes it, cut to `most` characters at its end, or at its beginning; never longer than 80."""
    shown = text[-most:] if keep_end else text[:most]
    while True:
        mark = "..." if len(shown) < len(text) else ""
        result = repr(mark + shown if keep_end else shown + mark)
        excess = len(result) - SHOWN_CHARACTERS
        if excess <= 0:
            return result
        cut = -(-excess // 10)  # one character is written with at most ten
        shown = shown[cut:] if keep_end else shown[:-cut]


def named(names: Iterable[str]) -> str:
    """Names as a list of at most eight, with the number of the others."""
    every = list(names)
    more = f" and {len(every) - SHOWN_NAMES:,} more" if len(every) > SHOWN_NAMES else ""
    return ", ".join(quoted(name) for name in every[:SHOWN_NAMES]) + more


def first_line(error: BaseException) -> str:
    """The first line of what a library says, at most 200 characters of it and without the point at its end."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / MB:,.0f} MB"
