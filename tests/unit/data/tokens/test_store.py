"""A store is the same for any number of ranks and workers, is made once, and is right by a slow oracle."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from ds_recipes.data.formats.choose import make_format
from ds_recipes.data.formats.sample import FormatSettings
from ds_recipes.data.tokens import make, share, store
from ds_recipes.data.tokens.documents import Documents
from ds_recipes.errors import InputError
from tests.unit.data.kinds import tokenizer_of
from tests.unit.data.made import make_tokenizer, write_jsonl
from tests.unit.data.tokens.stores import (
    check_against_oracle,
    documents_on,
    make_corpus,
    make_recipe,
    only_store,
    open_alone,
    open_on,
    store_files,
)

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.mark.parametrize("size, workers", [(1, 0), (2, 0), (3, 0), (4, 0), (9, 0), (1, 1), (1, 2), (2, 2)])
def test_the_files_do_not_depend_on_ranks_and_workers(tmp_path: Path, size: int, workers: int) -> None:
    expected = make_corpus(tmp_path / "data")
    cache = tmp_path / "cache"
    alone = open_alone(tmp_path / "data", make_recipe(cache=tmp_path / "alone"))
    assert len(list((alone.folder / "parts").iterdir())) > 10
    for documents in documents_on(size, tmp_path / "data", make_recipe(cache=cache, workers=workers)):
        check_against_oracle(documents, expected)
        assert documents.fingerprint == alone.fingerprint
    assert store_files(only_store(cache)) == store_files(alone.folder)
    assert sorted(path.name for path in cache.iterdir() if path.name.startswith(".")) == []


def test_ranks_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_corpus(tmp_path / "data")
    shares: list[list[int]] = []
    init = share.Share.__init__

    def noted(self: share.Share, task: Any, parts: Any, num_workers: int) -> None:
        shares.append(list(parts))
        init(self, task, parts, num_workers)

    monkeypatch.setattr(share.Share, "__init__", noted)
    (documents, *_) = documents_on(3, tmp_path / "data", make_recipe())
    parts = len(list((documents.folder / "parts").iterdir()))
    assert sorted(part for one in shares for part in one) == list(range(parts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_records(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a dog"}])
    for documents in documents_on(4, path, make_recipe()):
        check_against_oracle(documents, [(path, 1, "a dog")])


Entry = st.one_of(st.text("ab日 </s>", min_size=1, max_size=60), st.sampled_from([None, 7, ""]))
File = st.lists(Entry, min_size=1, max_size=20).filter(lambda entries: set(entries) != {None})


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(File, min_size=1, max_size=3), size=st.integers(1, 3))
def test_any_records_give_their_documents_or_the_first_error(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[Any]], size: int
) -> None:
    """None stands for a blank line, 7 for a line that is no record, "" for a record without a target."""
    folder = tmp_path_factory.mktemp("any")
    good, bad = [], []
    for number, entries in enumerate(files):
        path = folder / f"{number}.jsonl"
        write_jsonl(path, ["" if entry is None else 7 if entry == 7 else {"text": entry} for entry in entries])
        path.write_text(path.read_text().replace('""\n', "\n").replace('{"text": \n', '{"text": ""}\n'))
        for line, entry in enumerate(entries, 1):
            if isinstance(entry, str) and entry:
                good.append((path, line, entry))
            elif entry is not None:
                bad.append(f"{path}:{line}: ")
    for outcome in open_on(size, f"{folder}/*.jsonl", make_recipe()):
        if bad:
            assert isinstance(outcome, InputError) and str(outcome).startswith(bad[0])
        else:
            check_against_oracle(outcome, good)
    for outcome in open_on(size, f"{folder}/*.jsonl", make_recipe(skip_bad=True)):
        if isinstance(outcome, Documents):
            check_against_oracle(outcome, good)
            assert outcome.num_bad == len(bad)
            assert all(text.startswith(where) for text, where in zip(outcome.first_bad, bad, strict=False))
            assert len(outcome.first_bad) == min(10, len(bad))
        else:
            assert isinstance(outcome, InputError) and not good


def test_a_later_start_reads_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_corpus(tmp_path / "data")
    said: list[str] = []
    open_alone(tmp_path / "data", make_recipe())

    def fail(*_: Any) -> None:
        raise AssertionError("this belongs to making a store")

    for module, name in ((make, "PartMaker"), (make, "read_batches"), (store, "build"), (store, "plan_parts")):
        monkeypatch.setattr(module, name, fail)
    for documents in documents_on(3, tmp_path / "data", make_recipe(), said.append):
        check_against_oracle(documents, expected)
    assert said == [f"tokens of {tmp_path / 'data'}: taken from {only_store(tmp_path / 'data' / '.index_cache')}"]


def folder_of(path: Path, **recipe: Any) -> Path:
    return open_alone(path, make_recipe(**recipe)).folder


def test_what_decides_the_tokens_decides_the_store(tmp_path: Path) -> None:
    make_corpus(tmp_path / "data", files=1)
    (path,) = (tmp_path / "data").glob("*.jsonl")
    folders = [
        folder_of(path),
        folder_of(path, tokenizer=make_tokenizer(adds_bos=False)),
        folder_of(path, vocabulary_size=1 << 17),
        folder_of(path, skip_bad=True),
        folder_of(path, streaming=True),
        folder_of(path, format=FormatSettings("text", text_fields=("text", "text"))),
    ]
    path.write_text(path.read_text().replace("dog 0", "dog 9"))
    folders.append(folder_of(path))
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("kind, is_other", [("llama 2", True), ("wordpiece", True), ("gemma", False), ("gpt 2", False)])
def test_stores_of_parts_that_were_joined_with_a_space_are_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, is_other: bool
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the ", "completion": "fox", "text": "the fox"}])
    for dataset, changes in (("completion", is_other), ("text", False)):
        recipe = make_recipe(tokenizer=tokenizer_of(kind), format=FormatSettings(dataset), vocabulary_size=1 << 10)
        now = open_alone(path, recipe)
        with monkeypatch.context() as patched:
            patched.setattr(store.Recipe, "version_for", lambda *_: str(store.VERSION))
            before = open_alone(path, recipe)
        assert (before.folder != now.folder, before.fingerprint != now.fingerprint) == (changes, changes)


@pytest.mark.parametrize("dataset, is_other", [("text", True), ("completion", True), ("tokens", False)])
def test_stores_of_texts_without_what_the_tokenizer_puts_before_them_are_not_used_again(
    dataset: str, is_other: bool
) -> None:
    tokenizer = copy.deepcopy(make_tokenizer(adds_bos=False))
    tokenizer.add_tokens(["<sop>"], special_tokens=True)
    before = processors.TemplateProcessing(single="<sop> $A", special_tokens=[("<sop>", 300)])
    tokenizer.backend_tokenizer.post_processor = before
    recipe = make_recipe(tokenizer=tokenizer, format=FormatSettings(dataset), vocabulary_size=400)
    record_format = make_format(recipe.format, tokenizer)
    assert (recipe.version_for(record_format) != str(store.VERSION)) == is_other
    plain = make_recipe(tokenizer=make_tokenizer(), format=FormatSettings(dataset))
    assert plain.version_for(record_format) == str(store.VERSION)


def test_moved_data_keep_their_store_and_are_named_as_they_are_now(tmp_path: Path) -> None:
    records: list[Any] = [{"text": "a dog"}, {"txt": "a"}, {"text": "a fox"}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    recipe = make_recipe(cache=tmp_path / "cache", skip_bad=True)
    first = open_alone(path, recipe)
    moved = path.rename(tmp_path / "b.jsonl")
    said: list[str] = []
    documents = open_alone(moved, recipe, said.append)
    assert (documents.folder, documents.fingerprint) == (first.folder, first.fingerprint)
    assert len(said) == 1 and "taken from" in said[0]
    assert documents.where(1) == f"{moved}:3"
    assert documents.first_bad[0].startswith(f"{moved}:2: ")
    assert [name for name, _ in documents.files] == [str(moved)]


def test_the_fingerprint_is_of_the_documents_not_of_how_they_are_kept(tmp_path: Path) -> None:
    make_corpus(tmp_path / "data")
    fingerprints = {
        open_alone(tmp_path / "data", make_recipe(**changes)).fingerprint
        for changes in ({}, {"streaming": True}, {"vocabulary_size": 1 << 17})
    }
    assert len(fingerprints) == 1
    assert open_alone(tmp_path / "data", make_recipe(skip_bad=True)).fingerprint not in fingerprints


@pytest.mark.parametrize("vocabulary_size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_take_16_bits_where_they_can(tmp_path: Path, vocabulary_size: int, dtype: type) -> None:
    expected = make_corpus(tmp_path / "data")
    documents = open_alone(tmp_path / "data", make_recipe(vocabulary_size=vocabulary_size))
    assert documents.tokens(0).dtype == dtype
    check_against_oracle(documents, expected)


def test_a_tokenizer_without_bos_makes_no_bos_and_no_target_of_the_first_token(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a dog"}])
    tokenizer = make_tokenizer(adds_bos=False)
    documents = open_alone(path, make_recipe(tokenizer=tokenizer))
    ids = [*tokenizer("a dog").input_ids, tokenizer.eos_token_id]
    assert documents.tokens(0).tolist() == ids
    assert documents.spans_of(0).tolist() == [[1, len(ids)]]


def test_the_first_ten_of_all_bad_records_are_named_in_order(tmp_path: Path) -> None:
    records: list[Any] = [{"text": f"a dog {i}"} if i % 3 else {"title": "a"} for i in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    for documents in documents_on(3, path, make_recipe(skip_bad=True)):
        assert documents.num_bad == 20
        assert [message.split(": ")[0] for message in documents.first_bad] == [
            f"{path}:{1 + i}" for i in range(0, 30, 3)
        ]
        check_against_oracle(documents, [(path, 1 + i, f"a dog {i}") for i in range(60) if i % 3])


def test_data_without_a_usable_record_are_refused_at_every_start(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"txt": "a"}] * 3)
    for _ in range(2):
        for error in open_on(2, path, make_recipe(skip_bad=True)):
            assert isinstance(error, InputError)
            assert str(error).startswith(f"{path}: holds no record that can be used (3 ")
            assert f"the first: {path}:1: the record has no field 'text'" in str(error)


def test_a_function_may_leave_records_out(tmp_path: Path) -> None:
    function = tmp_path / "own.py"
    function.write_text("def keep(record):\n    return record['text'] if record['keep'] else None\n")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a dog {i}", "keep": i % 2} for i in range(40)])
    recipe = make_recipe(format=FormatSettings(f"{function}:keep"), workers=1)
    for documents in documents_on(2, path, recipe):
        assert documents.num_left_out == 20
        check_against_oracle(documents, [(path, 1 + i, f"a dog {i}") for i in range(1, 40, 2)])


def test_a_read_only_folder_has_its_store_elsewhere(tmp_path: Path) -> None:
    expected = make_corpus(tmp_path / "data")
    (tmp_path / "data" / ".index_cache").write_text("a file where the folder would be")
    documents = open_alone(tmp_path / "data", make_recipe(fallback_cache=tmp_path / "run"))
    assert documents.folder.parent == tmp_path / "run"
    check_against_oracle(documents, expected)


def test_ranks_that_share_no_folder_make_a_store_each(tmp_path: Path) -> None:
    expected = make_corpus(tmp_path / "data")
    caches = [tmp_path / "one", tmp_path / "two"]
    outcomes = documents_on(4, tmp_path / "data", lambda rank: make_recipe(cache=caches[rank % 2]))
    for rank, documents in enumerate(outcomes):
        assert documents.folder.parent == caches[rank % 2]
        check_against_oracle(documents, expected)
    assert store_files(only_store(caches[0])) == store_files(only_store(caches[1]))
    # One has its store already, the other has lost it.
    shutil.rmtree(only_store(caches[1]))
    for documents in documents_on(4, tmp_path / "data", lambda rank: make_recipe(cache=caches[rank % 2])):
        check_against_oracle(documents, expected)


def test_few_maps_at_once_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_corpus(tmp_path / "data")
    documents = open_alone(tmp_path / "data", make_recipe())
    monkeypatch.setattr(documents._ids._maps, "_most", 2)
    order = np.random.default_rng(0).permutation(len(documents))
    kept = [documents.tokens(document) for document in order]
    whole = open_alone(tmp_path / "data", make_recipe())
    assert all(np.array_equal(ids, whole.tokens(document)) for ids, document in zip(kept, order, strict=True))
    assert len(documents._ids._maps._kept) <= 2
    check_against_oracle(documents, expected)
