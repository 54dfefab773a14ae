"""Documents are the same for any number of ranks, and so is the error of the first wrong record."""

from pathlib import Path
from typing import Any

import pytest

from ds_recipes.data.dataset import build_dataset
from ds_recipes.data.formats import FORMATS
from ds_recipes.data.tokenised import Documents, tokenise
from ds_recipes.errors import InputError
from tests.unit.data.made import make_tokenizer, on_ranks, write_jsonl


def tokenise_on(size: int, paths: list[Path], dataset_format: str = "text", vocabulary_size: int = 300) -> list[Any]:
    tokenizer = make_tokenizer()
    return on_ranks(size, lambda world: tokenise(paths, FORMATS[dataset_format], tokenizer, vocabulary_size, world))


def two_files(folder: Path) -> list[Path]:
    first = write_jsonl(folder / "a.jsonl", [{"text": f"a dog {i} 日本"} for i in range(5)])
    return [first, write_jsonl(folder / "b.jsonl", [{"text": f"fox {i}"} for i in range(3)])]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 11])
def test_every_rank_gets_all_documents_in_order(tmp_path: Path, size: int) -> None:
    tokenizer = make_tokenizer()
    texts = [f"a dog {i} 日本" for i in range(5)] + [f"fox {i}" for i in range(3)]
    for documents in tokenise_on(size, two_files(tmp_path)):
        assert isinstance(documents, Documents), documents
        assert [documents.tokens(i).tolist() for i in range(len(documents))] == [
            [0, *tokenizer(text, add_special_tokens=False).input_ids, 1] for text in texts
        ]
        assert [documents.where(i).split("/")[-1] for i in (0, 4, 5, 7)] == [
            "a.jsonl:1", "a.jsonl:5", "b.jsonl:1", "b.jsonl:3"
        ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_report_the_first_wrong_record(tmp_path: Path, size: int) -> None:
    records: list[Any] = [{"text": "a"} for _ in range(40)]
    records[17], records[30] = {"txt": "a"}, [1]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    errors = tokenise_on(size, [path])
    assert all(isinstance(error, InputError) for error in errors)
    assert {str(error) for error in errors} == {
        f"{path}:18: the record has no field 'text' (it has 'txt'). Add it, or set --dataset to the "
        "format that the file has."
    }


def test_a_token_beyond_the_embedding_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "the dog"}])
    largest = max(make_tokenizer()("the dog").input_ids)
    token = make_tokenizer().convert_ids_to_tokens(largest)
    (error,) = tokenise_on(1, [path], vocabulary_size=largest)
    assert str(error) == (
        f"{path}:2: the tokenizer makes token {token!r} (id {largest}), but the model has embeddings for ids below "
        f"{largest}. Set --tokenizer_name to the model's own tokenizer, or enlarge the model's embedding."
    )


def test_ranks_that_read_different_files_are_told_so(tmp_path: Path) -> None:
    def run(world: Any) -> Any:
        folder = tmp_path / str(world.rank)
        folder.mkdir()
        path = write_jsonl(folder / "a.jsonl", [{"text": "a" * (1 + world.rank // 2)}])
        tokenizer = make_tokenizer()
        return build_dataset([path], "text", "documents", 8, tokenizer, len(tokenizer), world)

    for error in on_ranks(3, run):
        assert "not the same content on all hosts: ranks 2 read other bytes than rank 0." in str(error)


def test_a_tokenizer_without_bos_makes_no_bos_and_no_target_of_the_first_token(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a dog"}])
    tokenizer = make_tokenizer(adds_bos=False)
    (documents,) = on_ranks(1, lambda world: tokenise([path], FORMATS["text"], tokenizer, 300, world))
    assert documents.tokens(0).tolist() == [*tokenizer("a dog").input_ids, 1]
    assert documents.target_start.tolist() == [1]
