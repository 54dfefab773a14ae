"""tools/index_jsonl.py as a user starts it: what it prints, its exit status, and that it never loads torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_recipes.data.index.cache import index_folder
from tests.unit.data.index.made import PACKERS, make_cache, was_read, write

TOOL = Path(__file__).parents[4] / "tools" / "index_jsonl.py"
LINES = b'{"a": 1}\n{"a": 2}\n\n{"a": 3}'


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which importing torch, DeepSpeed or transformers raises."""
    folder = tmp_path_factory.mktemp("trap")
    for name in ("torch", "deepspeed", "transformers"):
        write(folder / name / "__init__.py", b"raise RuntimeError(f'{__name__} was imported')\n")
    return os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "100"}


def run(folder: Path, trap: dict[str, str], *arguments: str) -> tuple[int, list[str]]:
    command = [sys.executable, str(TOOL), *arguments]
    ended = subprocess.run(
        command, cwd=folder, env=trap, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    assert "Traceback" not in ended.stdout, ended.stdout
    return ended.returncode, ended.stdout.splitlines()


def test_files_globs_and_folders_are_indexed_and_checked(tmp_path: Path, trap: dict[str, str]) -> None:
    files = [
        write(tmp_path / "a.jsonl", LINES),
        write(tmp_path / "b.jsonl.gz", PACKERS["gzip"](LINES)),
        write(tmp_path / "c" / "d.json", b'[{"a": 1},\n {"a": 2}]'),
        write(tmp_path / "c" / "d.jsonl.zst", PACKERS["zstd"](LINES)),
    ]
    write(tmp_path / "c" / "e.parquet", b"PAR1")
    write(tmp_path / "c" / ".index_cache" / "old.json", b"{}")
    status, lines = run(tmp_path, trap, "a.jsonl", "*.gz", "c", "a.jsonl", "--strict", "--json")
    assert status == 0
    assert len(lines) == 8
    assert lines[0].startswith("a.jsonl: 4 lines in 27 bytes, ")
    assert lines[0].endswith(f" GB/s, index in .index_cache/{index_folder(files[0], tmp_path).name}")
    assert lines[1].startswith("a.jsonl: checked as UTF-8 and JSON in ") and lines[1].endswith(" s: 0 faults")
    assert lines[4].startswith("c/d.json: 2 elements in 21 bytes")
    assert not any(was_read(path) for path in files)
    status, lines = run(tmp_path, trap, "a.jsonl")
    assert status == 0 and len(lines) == 1 and ", was there, index in " in lines[0]


def test_faults_are_named_and_the_other_files_go_on(tmp_path: Path, trap: dict[str, str]) -> None:
    write(tmp_path / "bad.jsonl", b'{"a": 1}\nnull\n' + b"\xff\n" * 20)
    good = write(tmp_path / "good.jsonl", LINES)
    write(tmp_path / "empty.jsonl", b"")
    words = ("none.jsonl", "nowhere/a.jsonl", "*.nothing", "empty.jsonl", "bad.jsonl", "good.jsonl")
    status, lines = run(tmp_path, trap, *words, "--json", "--quiet")
    assert status == 2
    assert lines[0].startswith("error: none.jsonl: no such file (looked in ")
    assert lines[1].startswith("error: nowhere/a.jsonl: no such file (looked in ")
    assert lines[2] == "error: *.nothing: no file matches this pattern"
    assert lines[3].startswith("error: empty.jsonl: is empty.")
    assert lines[4:6] == ["bad.jsonl:2: not a JSON object", "bad.jsonl:3: not UTF-8 (byte 0xff: invalid start byte)"]
    assert lines[-1].endswith(" s: 21 faults, the first 10 above") and len(lines) == 15
    assert not was_read(good) and not (tmp_path / "nowhere").exists()


def test_a_text_index_is_written_and_one_that_leaves_lines_out_is_told(tmp_path: Path, trap: dict[str, str]) -> None:
    path = write(tmp_path / "a.jsonl", LINES)
    target = write(make_cache(path) / "a.idx", b"0\n9\n18\n")
    status, lines = run(tmp_path, trap, "a.jsonl")
    assert status == 0
    leaves = ".index_cache/a.idx leaves out 1 line of a.jsonl, the first is line 4; delete it to use them all"
    assert lines[1:] == [f"a.jsonl: note: {leaves}"]
    status, lines = run(tmp_path, trap, "a.jsonl", "--text")
    assert status == 0 and len(lines) == 1
    assert target.read_text() == "0\n9\n18\n19\n"


def test_indexes_go_to_a_folder_that_is_asked_for(tmp_path: Path, trap: dict[str, str]) -> None:
    path = write(tmp_path / "data" / "a.jsonl", LINES)
    status, lines = run(tmp_path, trap, "data/a.jsonl", "--cache", "kept/here", "--text")
    assert status == 0 and f"kept/here/{index_folder(path, tmp_path).name}" in lines[0]
    assert (tmp_path / "kept" / "here" / "a.idx").read_text() == "0\n9\n18\n19\n"
    assert [found.name for found in path.parent.iterdir()] == ["a.jsonl"]
    write(tmp_path / "file", b"")
    status, lines = run(tmp_path, trap, "data/a.jsonl", "--cache", "file/below")
    assert status == 2 and lines[0].startswith("error: data/a.jsonl: file/below cannot be written")


def test_a_terminal_shows_a_bar(tmp_path: Path, trap: dict[str, str]) -> None:
    write(tmp_path / "[a].jsonl", b"".join(json.dumps({"a": number}).encode() + b"\n" for number in range(300_000)))
    command = f"{sys.executable} {TOOL} '[a].jsonl' --strict"
    program = "import pty, sys; sys.exit(pty.spawn(['sh', '-c', sys.argv[1]]) >> 8)"
    shown = subprocess.run(
        [sys.executable, "-c", program, command],
        cwd=tmp_path,
        env=trap | {"TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0, shown.stdout
    assert "[a].jsonl: index" in shown.stdout and "━" in shown.stdout
    assert "[a].jsonl: 300,000 lines in " in shown.stdout
