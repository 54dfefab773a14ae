"""A skip that the list does not name fails the session; a named one does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.tree import ROOT

ONE_SKIPPED = "import pytest\n\ndef test_runs():\n    pass\n\ndef test_hides():\n    pytest.skip('no such machine')\n"
WHOLE_FILE = "import pytest\n\npytest.skip('not today', allow_module_level=True)\n"


def run_pytest(folder: Path, test: str, allowed: str, *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    (folder / "test_it.py").write_text(test)
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "allowed.txt").write_text(allowed)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--allowed-skips", "allowed.txt", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "ALLOWED_SKIPS"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize(
    "allowed", ["", "# test_it.py::test_hides: no such machine\n", "test_it.py::test_hides: another\n"]
)
def test_unlisted_skip_fails(tmp_path: Path, allowed: str) -> None:
    result = run_pytest(tmp_path, ONE_SKIPPED, allowed)
    assert result.returncode == 1
    assert "test_it.py::test_hides: no such machine" in result.stdout


@pytest.mark.parametrize("workers", ["0", "1"])
def test_listed_skip_passes_and_another_fails_with_workers_too(tmp_path: Path, workers: str) -> None:
    listed = "test_it.py::test_hides: no such machine\n"
    assert run_pytest(tmp_path, ONE_SKIPPED, listed, "--numprocesses", workers).returncode == 0
    result = run_pytest(tmp_path, ONE_SKIPPED, "", "--numprocesses", workers)
    assert result.returncode == 1
    assert "test_it.py::test_hides: no such machine" in result.stdout


def test_skipped_file_fails(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, WHOLE_FILE + ONE_SKIPPED, "")
    assert result.returncode != 0
