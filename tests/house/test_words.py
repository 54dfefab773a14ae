"""The project names no single machine, holds no promises, and its short pages stay short."""

import re
import subprocess

from tests.house.tree import ROOT, parsed, python_files

CONTRIBUTING_LINES = 150
FOLDERS_WITH_CONTENT = ("ds_configs", "examples", "tools", "ds_recipes", "tests", "benchmarks", "docs/decisions")
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".json", ".toml", ".txt", ".sh", ""}

# Written in pieces, so that this file does not find itself.
MACHINE_PATHS = re.compile(
    "|".join(["/" + "work/", "/" + "farm/", r"/tmp/" + "bash_jobs", r"\.\./" + "shared", "/" + "home/[a-z]+/"])
)
PROMISES = re.compile("|".join(["NotImplemented" + "Error", r"\bTO" + "DO\b", r"\bFIX" + "ME\b", r"\bXX" + r"X\b"]))


def project_files() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    names = [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    return [name for name in names if (ROOT / name).suffix in TEXT_SUFFIXES]


def lines_with(pattern: re.Pattern[str], names: list[str]) -> list[str]:
    return [
        f"{name}:{number} {line.strip()[:100]}"
        for name in names
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_machine_is_named() -> None:
    assert not lines_with(MACHINE_PATHS, project_files())


def test_nothing_is_promised_for_later() -> None:
    assert not lines_with(PROMISES, [name for name in project_files() if name.endswith(".py")])


def test_no_file_is_a_drawer_for_helpers() -> None:
    assert not [file for file in python_files() if file.stem in ("utils", "helpers", "misc", "common")]


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= CONTRIBUTING_LINES


def test_folders_of_the_design_have_content() -> None:
    empty = [name for name in FOLDERS_WITH_CONTENT if not any(path.is_file() for path in (ROOT / name).rglob("*"))]
    assert not empty


def test_every_test_folder_with_tests_is_a_package() -> None:
    """Two test files of the same name in different folders would otherwise hide each other."""
    folders = {file.parent for file in python_files("tests")}
    assert not [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists()]


def test_every_python_file_parses() -> None:
    assert all(parsed(file) for file in python_files())
