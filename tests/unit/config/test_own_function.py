"""What can be told of a user's own format without running its file."""

from pathlib import Path

import pytest

from ds_recipes.config.own_function import check_own, split_own


def test_splits_file_and_function() -> None:
    assert split_own("a/b:c.py:read_it") == (Path("a/b:c.py"), "read_it")
    assert [split_own(text) for text in ("text", "a.py", "a.py:", "a.txt:f", "a.py:f.g", "a.py:f ")] == [None] * 6


@pytest.mark.parametrize(
    "code",
    [
        "def f(record): ...",
        "class f: ...",
        "f = g = lambda record: ''",
        "f: object = len",
        "(a, f), b = (1, 2), 3",
        "from a import b as f",
        "from a import *",
        "if True:\n    pass\nelse:\n    def f(record): ...",
        "try:\n    import a\nexcept ImportError:\n    def f(record): ...",
        "with a as b:\n    for c in d:\n        from e import f",
    ],
)
def test_finds_a_function_however_it_is_bound(tmp_path: Path, code: str) -> None:
    (tmp_path / "own.py").write_text(code)
    assert check_own(f"{tmp_path}/own.py:f") is None


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (b"", "has no function 'f'; it has none at all"),
        (
            b"def g(): ...\nclass A:\n    def f(self): ...\ndef h():\n    def f(): ...\n",
            "has no function 'f'; it has g, h",
        ),
        (b"print(f)\nf.x = 1\n", "has no function 'f'; it has none at all"),
        (b"a\xff", "is not Python ((unicode error) 'utf-8' codec can't decode byte 0xff in position 1"),
        (b"\0", "is not Python (source code string cannot contain null bytes)"),
        (b"a\nb c\n", ":2 is not Python (invalid syntax)"),
        (b"(" * 500, "is not Python (too many nested parentheses)"),
        (b"-" * 100_000 + b"1", "is not Python ("),
    ],
)
def test_names_what_is_wrong_without_running_the_file(tmp_path: Path, code: bytes, problem: str) -> None:
    path = tmp_path / "own.py"
    path.write_bytes(code)
    message = check_own(f"{path}:f")
    assert message is not None
    assert message.startswith(str(path))
    assert problem in message


def test_names_a_file_that_is_missing_and_a_name_that_is_none(tmp_path: Path) -> None:
    assert check_own(f"{tmp_path}/none.py:f") == f"there is no file {tmp_path}/none.py (looked in {Path.cwd()})"
    assert check_own(str(tmp_path / "own.py")) == "names no function; write path/to/file.py:function"
    (tmp_path / "a.py").mkdir()
    assert check_own(f"{tmp_path}/a.py:f") == f"{tmp_path}/a.py cannot be read (Is a directory)"
