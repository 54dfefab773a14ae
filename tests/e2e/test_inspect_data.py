"""`tools/inspect_data.py` tells what a run will train on: counts that a plain reading confirms, and what lies where."""

import json
import re
from pathlib import Path

import pytest

from tests.e2e.launchers import ROOT, run
from tests.nano import make_nano

REPEATED = 3


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose data hold three copies of one record."""
    folder = tmp_path_factory.mktemp("nano")
    run_file = make_nano(folder)
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([*lines, *[lines[0]] * REPEATED]))
    return run_file


def inspect(nano: Path, *flags: str) -> str:
    command = ["python", "tools/inspect_data.py", "--config", str(nano)]
    ended = run([*command, *flags], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert ended.status == 0, ended.output
    return ended.output


def test_counts_are_those_of_a_plain_reading(nano: Path) -> None:
    text = inspect(nano)
    lines = (nano.parent / "train.jsonl").read_text().splitlines()
    copies = len(lines) - len(set(lines))
    assert f"records    {len(lines)}: {len(lines)} documents, 0 bad, 0 left out" in text
    assert f"duplicates {copies} documents repeat" in text and "one of them 4 times" in text
    histogram = [int(count) for count in re.findall(r"\d+ to \d+ +(\d+) ", text.split("validation data")[0])]
    assert sum(histogram) == len(lines)
    assert "% padding" in text and "their ends were cut off" in text
    assert "⟦" in text and f"{nano.parent / 'train.jsonl'}:" in text
    assert not (ROOT / "runs" / "inspect_data").exists(), "looking needs no run folder and leaves none"


def test_what_lies_at_a_position_is_what_a_run_trains_there(nano: Path) -> None:
    text = inspect(nano, "--sample", "0", "17")
    assert "position 0, step 1: row " in text and "position 17, step 2: row " in text
    place = re.search(r"positions 0 to \d+: (\S+):(\d+), its tokens", text)
    assert place is not None, text
    record = json.loads(Path(place[1]).read_text().splitlines()[int(place[2]) - 1])
    assert record["output"].split()[0] in text


def test_what_cannot_be_used_ends_with_two(nano: Path) -> None:
    command = ["python", "tools/inspect_data.py", "--config", str(nano), "--save_checkpoint_path", "unused"]
    ended = run([*command, "--sample", "first"])
    assert ended.status == 2 and "--sample takes whole numbers" in ended.output
    ended = run([*command, "--train_data", "gone.jsonl"])
    assert ended.status == 2 and "there is no such file" in ended.output and "Traceback" not in ended.output
