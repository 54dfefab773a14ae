"""What a shared file system says for a moment is waited out, within bounds; what it says for good names the file."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_recipes.checkpoint.load import find_newest
from ds_recipes.errors import DsRecipesError, UnreadableError
from ds_recipes.fsops import again as again_module
from ds_recipes.fsops import calls, faults
from ds_recipes.world.group import World, solo
from tests.faults.flat_saves import ShareEngine, armed
from tests.ranks.launch import run_ranks
from tests.unit.checkpoint.flat_engine import save


@pytest.fixture(autouse=True)
def nobody_stands_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And nobody waits for long."""
    monkeypatch.setattr(again_module.again, "__defaults__", ((), (0.01, 0.01, 0.01)))
    yield
    calls.interceptor = None


def arm(text: str) -> None:
    calls.interceptor = faults.Faults(faults.parse(text))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2):
        save(tmp_path / "run", step)
    return tmp_path / "run"


@pytest.mark.parametrize("error", ["ESTALE", "EIO"])
@pytest.mark.parametrize("kind", ["open", "stat", "list"])
@pytest.mark.parametrize("path", ["*/run", "*/iter_0000002", "*manifest*", "*state*", "*rank-*"])
def test_a_reading_that_fails_for_a_moment_is_made_again(run: Path, error: str, kind: str, path: str) -> None:
    arm(f"fail:{error}@1x2 kind={kind} path={path}")
    found = find_newest(run, solo())
    assert found is not None and found.manifest.step == 2 and not found.skipped


@pytest.mark.parametrize("error", ["ESTALE", "EIO"])
@pytest.mark.parametrize("name", ["rank-00000-of-00001.safetensors", "manifest.json", "state.json"])
def test_a_file_that_stays_unreadable_is_named_and_no_older_checkpoint_is_taken(
    run: Path, error: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not answer has damaged nothing: what lies there is the newest checkpoint still."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    arm(f"fail:{error}@1x99 kind=open path=*iter_0000002/{name}")
    with pytest.raises(UnreadableError, match=f"iter_0000002/{name}: cannot be read"):
        find_newest(run, solo())


@pytest.mark.parametrize("error", ["ESTALE", "EIO", "EACCES"])
def test_a_run_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(run: Path, error: str) -> None:
    arm(f"fail:{error}@1x99 kind=list path=*/run")
    with pytest.raises((OSError, DsRecipesError), match=str(run)):
        find_newest(run, solo())


@pytest.mark.parametrize("fault", ["fail:ESTALE@1x2 kind=rename", "fail:EIO@1x2 kind=rename"])
def test_a_rename_that_fails_for_a_moment_is_made_again(run: Path, fault: str) -> None:
    arm(fault)
    save(run, 3)
    calls.interceptor = None
    found = find_newest(run, solo())
    assert found is not None and found.manifest.step == 3


@pytest.mark.parametrize("kind", ["write", "fsync"])
def test_what_could_not_be_written_or_made_durable_is_never_tried_twice(run: Path, kind: str) -> None:
    """After a failed fsync the kernel may have dropped the data, and a second one would succeed without them."""
    seen = []

    def fail_once(call: calls.Call) -> None:
        if call.kind == kind and "rank-" in call.path.name:
            seen.append(call)
            if len(seen) == 1:
                raise OSError(errno.EIO, "Input/output error")

    calls.interceptor = fail_once
    with pytest.raises(DsRecipesError, match=r"rank-00000-of-00001\.safetensors.*Input/output error"):
        save(run, 3)
    assert len(seen) == 1


def save_seen_late(world: World, folder: str) -> int:
    """Rank 1 does not see the partial folder, then the published one, the first times that it looks."""
    if world.rank == 1:
        faults.arm_from_environment()
    saved = save(Path(folder), 3, ShareEngine(3, world), world, keep_last=2)
    calls.interceptor = None
    found = find_newest(Path(folder), world)
    assert found is not None and found.path == saved
    return found.manifest.step


def test_a_folder_that_another_host_sees_late_is_waited_for(run: Path) -> None:
    late = "fail:ENOENT@1x2 kind=stat path=*.partial-*; fail:ESTALE@1x2 kind=open path=*iter_0000003*"
    steps = run_ranks(save_seen_late, 2, str(run), env=armed(late), with_deepspeed=False, timeout=60)
    assert steps == [3, 3]
