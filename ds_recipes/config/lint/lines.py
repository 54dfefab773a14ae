"""Where the keys of a JSON or Hjson text stand: the line of each, and the keys that stand twice in one object."""

import re
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"""
    (?P<space>[ \t\r]+)
  | (?P<newline>\n)
  | (?P<comment>\#[^\n]*|//[^\n]*|/\*.*?\*/)
  | (?P<block>'''.*?''')
  | (?P<quoted>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
  | (?P<mark>[{}\[\],:])
  | (?P<bare>[^\s{}\[\],:"'#/][^\s{}\[\],:#]*|.)
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass
class Places:
    """`lines`: dotted path -> line of its first key, from 1. `twice`: path and line of a second key of one name."""

    lines: dict[str, int] = field(default_factory=dict)
    twice: list[tuple[str, int]] = field(default_factory=list)

    def line_of(self, path: str) -> int | None:
        """The line of a key, or of the nearest section around it that is there."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path.rpartition(".")[0]
        return None


def find_places(text: str) -> Places:
    """Go through a text that could be read as JSON or Hjson."""
    places = Places()
    around: list[
        tuple[str, bool]
    ] = []  # of each open bracket: the path of what it holds, and whether that is an object
    line, last, path = 1, "", ""
    for token in TOKEN.finditer(text):
        kind, word = token.lastgroup, token.group()
        if kind == "mark" and word in "{[":
            around.append((path, word == "{"))
            last = ""
        elif kind == "mark" and word in "}]" and around:
            around.pop()
            path, last = around[-1][0] if around else "", ""
        elif kind == "mark" and word == ":" and last and (not around or around[-1][1]):
            path = _note(places, around, last, line)
            last = ""
        elif kind == "mark" and word == "," and around:
            path = around[-1][0]
        elif kind in ("quoted", "bare"):
            last = word.strip("\"'") if kind == "quoted" else word
        line += word.count("\n")
    return places


def _note(places: Places, around: list[tuple[str, bool]], name: str, line: int) -> str:
    section = around[-1][0] if around else ""
    path = f"{section}.{name}" if section else name
    is_in_list = not all(is_object for _, is_object in around)
    if path in places.lines and not is_in_list:
        places.twice.append((path, line))
    places.lines.setdefault(path, line)
    return path
