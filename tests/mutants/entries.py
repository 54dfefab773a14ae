"""Hand-made faults, one at a time: what is put in the place of what, in which file, and the tests that must catch it.

Each file `AREA.toml` here holds some:

    [[mutant]]
    name = "the-loss-is-divided-by-all-tokens"
    file = "ds_recipes/training/loop.py"
    old = "scale=1 / totals.target_tokens"      # stands once in the file
    new = "scale=1 / totals.tokens"
    tests = ["tests/ranks/test_step_oracle.py"]   # tests of every day, of which one must fail
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    """One fault. `area` is the file of this folder that holds it."""

    area: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def changed(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: `old` does not stand there exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {self.old!r} stands there {text.count(self.old)} times")
        return text.replace(self.old, self.new)


def read_mutants(folder: Path = HERE) -> list[Mutant]:
    """All of them, by area and in their order."""
    return [
        Mutant(path.stem, entry["name"], entry["file"], entry["old"], entry["new"], tuple(entry["tests"]))
        for path in sorted(folder.glob("*.toml"))
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    ]
