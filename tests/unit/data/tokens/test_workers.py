"""Worker processes: what becomes of them when they, or their parent, are killed; and what they do not load."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.data.formats.sample import FormatSettings
from ds_recipes.data.tokens import store
from ds_recipes.data.tokens.answers import Made
from ds_recipes.data.tokens.files import describe
from ds_recipes.data.tokens.make import BATCH_RECORDS, Task
from ds_recipes.data.tokens.workers import Workers
from ds_recipes.errors import DsRecipesError
from tests.ranks.launch import fork_rank
from tests.unit.data.made import write_jsonl
from tests.unit.data.tokens.stores import cut_small, make_recipe, open_alone, store_files

pytestmark = pytest.mark.usefixtures("small_parts")


def make_task(folder: Path, monkeypatch: pytest.MonkeyPatch, **recipe: Any) -> Task:
    """The task of a store whose parts are not made yet."""
    tasks: list[Task] = []
    path = write_jsonl(folder / "a.jsonl", [{"text": f"a dog {i}"} for i in range(100)])
    with monkeypatch.context() as patch:
        patch.setattr(store, "build", lambda _, task, *rest: tasks.append(task))
        patch.setattr(store, "_open", lambda *_: None)
        open_alone_loosely(path, make_recipe(**recipe))
    return tasks[0]


def open_alone_loosely(path: Path, recipe: Any) -> None:
    try:
        open_alone(path, recipe)
    except AssertionError:
        return


def slow_function(folder: Path, seconds: float) -> str:
    """A format whose function sleeps at every record, as long as the file `seconds` says."""
    (folder / "seconds").write_text(str(seconds))
    function = folder / "own.py"
    function.write_text(
        "import time\nfrom pathlib import Path\n\n"
        f"def read(record):\n    time.sleep(float(Path({str(folder / 'seconds')!r}).read_text()))\n    return record['text']\n"
    )
    return f"{function}:read"


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_parts_are_made_once_each_and_nobody_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, monkeypatch)
    with Workers(task, 3) as workers:
        processes = [process.pid for process in workers._processes.values()]
        answers = list(workers.make(range(len(task.parts)), lambda part: True))
    assert sorted(answer.part for answer in answers) == list(range(len(task.parts)))
    assert all(isinstance(answer, Made) for answer in answers)
    assert not any(is_alive(process) for process in processes)


def test_parts_that_are_no_longer_wanted_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, monkeypatch, format=FormatSettings(slow_function(tmp_path, 30)))
    with Workers(task, 2) as workers:
        started = time.monotonic()
        answers = list(workers.make(range(len(task.parts)), lambda part: time.monotonic() < started + 1))
    assert answers == []
    assert time.monotonic() < started + 20


def test_a_worker_tells_how_far_a_part_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of three batches, each of which takes longer than the time between two messages."""
    cut_small(1 << 20, monkeypatch.setattr)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a dog {i}"} for i in range(2 * BATCH_RECORDS + 1)])
    recipe = make_recipe(format=FormatSettings(slow_function(tmp_path, 0.8 / BATCH_RECORDS)))
    task = store._task(tmp_path / "store", (describe(path, tmp_path),), recipe)
    (part,) = task.parts
    told: list[tuple[int, int]] = []
    with Workers(task, 1) as workers:
        answers = list(workers.make([0], lambda part: True, lambda *one: told.append(one)))
    assert [type(answer) for answer in answers] == [Made]
    assert {number for number, _ in told} == {0}
    assert told == sorted(told)
    assert any(0 < source_bytes < part.source_bytes for _, source_bytes in told)


def test_a_killed_worker_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, monkeypatch)

    def kill_one(part: int, workers: Workers) -> bool:
        process = next(iter(workers._processes.values()))
        process.kill()
        return True

    with Workers(task, 2) as workers, pytest.raises(DsRecipesError) as caught:
        list(workers.make(range(len(task.parts)), lambda part: kill_one(part, workers)))
    assert "a tokenising worker was killed (signal 9: Killed). Out of memory is the usual cause" in str(caught.value)


def open_with_workers(path: str, function: str) -> int:
    cut_small()
    open_alone(path, make_recipe(format=FormatSettings(function), workers=2))
    return 0


def children_of(process: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{process}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def test_workers_die_with_their_parent_and_the_next_start_goes_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a dog {i}"} for i in range(120)])
    function = slow_function(tmp_path, 0.05)
    rank = fork_rank(open_with_workers, (str(path), function), tmp_path / "output")
    until(lambda: len(made_parts(tmp_path)) >= 2)
    assert rank.pid is not None
    workers = children_of(rank.pid)
    assert len(workers) == 2
    (tmp_path / "seconds").write_text("60")  # they are in the midst of a part
    time.sleep(0.3)
    os.kill(rank.pid, signal.SIGKILL)
    until(lambda: not any(is_alive(worker) for worker in workers), 5)
    (tmp_path / "seconds").write_text("0")
    before = made_parts(tmp_path)
    documents = open_alone(path, make_recipe(format=FormatSettings(function)))
    assert len(documents) == 120
    assert before.items() < made_parts(tmp_path).items()
    undisturbed = open_alone(path, make_recipe(format=FormatSettings(function), cache=tmp_path / "other"))
    assert store_files(documents.folder) == store_files(undisturbed.folder)


def made_parts(folder: Path) -> dict[Path, int]:
    """The parts that are there, each with when it was made."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(".index_cache/tokens-*/parts/[0-9]*")}


def test_a_worker_ignores_signals_that_are_sent_to_a_whole_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, monkeypatch)
    with Workers(task, 1) as workers:
        assert len(list(workers.make([0], lambda part: True))) == 1
        (process,) = workers._processes.values()
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            process.send_signal(number)
        assert len(list(workers.make([1], lambda part: True))) == 1


def test_a_worker_dies_of_sigterm_even_if_its_rank_ignores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, monkeypatch)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Workers(task, 1) as workers:
            assert len(list(workers.make([0], lambda part: True))) == 1
            (process,) = workers._processes.values()
            process.terminate()
            assert process.wait(10) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_worker_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; import ds_recipes.data.tokens.worker; "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow', 'pandas') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert output.stdout.strip() == "[]"
