"""Parts cover every entry once, in order, whatever the files are, and depend on nothing but the data."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data import long_text
from ds_recipes.data.encode import Encoder
from ds_recipes.data.formats.sample import FormatSettings
from ds_recipes.data.tokens import parts
from ds_recipes.data.tokens.files import describe
from ds_recipes.data.tokens.make import PartMaker, Stopped, Task
from ds_recipes.data.tokens.parts import Part, PartFacts, Slice, plan_parts, read_facts, write_facts
from tests.unit.data.made import make_tokenizer


@settings(deadline=None, max_examples=30)
@given(files=st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=30), min_size=1, max_size=6))
def test_every_entry_is_in_one_part(tmp_path_factory: pytest.TempPathFactory, files: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("plan")
    described = []
    for number, lengths in enumerate(files):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in lengths))
        described.append(describe(path, folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "LEAST_BYTES", 500)
        patch.setattr(parts, "MOST_BYTES", 1000)
        plan = plan_parts(described)
    entries = [
        (piece.file, entry) for part in plan for piece in part.slices for entry in range(piece.start, piece.stop)
    ]
    assert entries == [(number, entry) for number, lengths in enumerate(files) for entry in range(len(lengths))]
    assert [part.number for part in plan] == list(range(len(plan)))
    total = sum(part.source_bytes for part in plan)
    assert len(plan) <= 1 + 2 * total / 500


def test_many_small_files_share_a_part(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02d}.jsonl").write_text('{"text": "a"}\n')
    (plan,) = plan_parts([describe(path, tmp_path) for path in sorted(tmp_path.glob("*.jsonl"))])
    assert [piece.file for piece in plan.slices] == list(range(50))


@pytest.mark.parametrize("repeats", [True, False], ids=["packs well", "packs badly"])
def test_a_compressed_file_has_as_many_parts_as_its_content(
    tmp_path: Path, repeats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that repeat are packed to a hundredth of their size."""
    monkeypatch.setattr(parts, "LEAST_BYTES", 40_000)
    monkeypatch.setattr(parts, "MOST_BYTES", 40_000)
    texts = ["the same " * 20 if repeats else str(hash((i, "salt")) ** 9)[:180] for i in range(4000)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    plain, packed = tmp_path / "plain.jsonl", tmp_path / "packed.jsonl.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    plans = [plan_parts([describe(path, tmp_path)]) for path in (plain, packed)]
    assert [len(plan) for plan in plans] == [len(plans[0])] * 2
    assert len(plans[0]) >= 15
    assert sum(part.source_bytes for part in plans[1]) == pytest.approx(len(content), rel=0.01)


def made_part(folder: Path) -> tuple[Part, PartFacts]:
    part = Part(3, (Slice(0, 5, 9), Slice(1, 0, 2)), 1000)
    (folder / "ids.npy").write_bytes(b"12345")
    facts = PartFacts((4, 2), 77, 6, 1, 0, ((0, ":7: is wrong"), (-1, "another")), {"ids.npy": 5})
    write_facts(folder, part, facts)
    return part, facts


def test_facts_are_read_back(tmp_path: Path) -> None:
    part, facts = made_part(tmp_path)
    assert read_facts(tmp_path, part) == facts


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "ids.npy").write_bytes(b"1234"),
        lambda folder: (folder / "ids.npy").unlink(),
        lambda folder: (folder / "part.json").unlink(),
        lambda folder: (folder / "part.json").write_text("{}"),
        lambda folder: (folder / "part.json").write_text("[1"),
        lambda folder: (folder / "part.json").write_text('{"slices": 3}'),
        lambda folder: (folder / "part.json").write_bytes(b"\xff\xfe"),
    ],
)
def test_a_damaged_part_is_none(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    part, _ = made_part(tmp_path)
    damage(tmp_path)
    assert read_facts(tmp_path, part) is None


def test_a_part_of_other_entries_is_none(tmp_path: Path) -> None:
    made_part(tmp_path)
    assert read_facts(tmp_path, Part(3, (Slice(0, 5, 9), Slice(1, 0, 3)), 1000)) is None


def test_a_long_text_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is to stop, or another rank has failed, while one record takes minutes."""
    monkeypatch.setattr(long_text, "LONG_CHARACTERS", 5000)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "the quick fox " * 20_000}) + "\n")
    file = describe(path, tmp_path)
    tokenizer = make_tokenizer()
    task = Task(
        tmp_path,
        (file,),
        plan_parts([file]),
        FormatSettings("text"),
        None,
        Encoder.of(tokenizer, 300),
        300,
        False,
        True,
    )
    asked: list[None] = []

    def go_on(source_bytes: int) -> bool:
        asked.append(None)
        return len(asked) < 10

    with pytest.raises(Stopped):
        PartMaker(task).make(0, go_on)
    assert len(asked) == 10
    assert len(PartMaker(task).make(0).documents) == 1
