"""What nothing reads, and nulls that only tables have, are counted over all parts and told once a source."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ds_recipes.data.formats import remarks
from ds_recipes.data.formats.remarks import NULLS, TWICE, UNREAD
from ds_recipes.data.formats.sample import FormatSettings
from tests.unit.data.corpora import corpus_of, rows_of
from tests.unit.data.formats.families import make_chat_tokenizer
from tests.unit.data.made import make_tokenizer, write_jsonl
from tests.unit.data.tokens.stores import cut_small, documents_on, make_recipe, only_store, open_alone, small_parts

__all__ = ["small_parts"]

RECORDS = [{"text": f"a dog {i}", "id": i, **({"note": "x"} if i % 3 == 0 else {"note": ""})} for i in range(40)]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (3, 2)])
def test_counts_do_not_depend_on_who_reads(tmp_path: Path, small_parts: None, ranks: int, workers: int) -> None:
    del small_parts
    path = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    for documents in documents_on(ranks, path, make_recipe(workers=workers)):
        assert documents.remarks == ((UNREAD, "id", 40), (UNREAD, "note", 14))
        assert len(documents) == 40
    assert open_alone(path, make_recipe()).remarks == ((UNREAD, "id", 40), (UNREAD, "note", 14)), "kept in the store"
    both = open_alone(path, make_recipe(format=FormatSettings("text", ("text", "note"))))
    assert both.remarks == ((UNREAD, "id", 40),)


def test_a_store_from_before_there_were_remarks_is_used(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    documents = open_alone(path, make_recipe(cache=tmp_path / "cache"))
    store = only_store(tmp_path / "cache")
    for file in (store / "store.json", *store.glob("parts/*/part.json")):
        content = json.loads(file.read_text())
        del content["remarks"]
        file.write_text(json.dumps(content))
    said: list[str] = []
    old = open_alone(path, make_recipe(cache=tmp_path / "cache"), said.append)
    assert said == [f"tokens of {path}: taken from {store}"]
    assert (len(old), old.remarks) == (len(documents), ())


@pytest.mark.parametrize(
    ("record", "dataset", "fields"),
    [
        ({"instruction": "i", "output": "o", "history": [["a", "b"]], "system": "s", "input": ""}, "alpaca", ["history", "system"]),
        ({"prompt": "p", "completion": "c", "labels": [1], "meta": {}}, "completion", ["labels"]),
        ({"input_ids": [5, 6], "labels": [5, 6], "token_type_ids": [0, 0]}, "tokens", ["token_type_ids"]),
        ({"text": "a", "日本": "b", "n": 0}, "text", ["日本", "n"]),
    ],
)  # fmt: skip
def test_every_format_tells_what_it_does_not_read(tmp_path: Path, record: Any, dataset: str, fields: list[str]) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [record, record])
    documents = open_alone(path, make_recipe(format=FormatSettings(dataset)))
    assert documents.remarks == tuple((UNREAD, field, 2) for field in fields)


def test_a_prompt_template_reads_the_fields_that_it_names(tmp_path: Path) -> None:
    prompts = {"prompt_input": "{system} {instruction} {input}", "prompt_no_input": "{system} {instruction}"}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    record = {"instruction": "i", "output": "o", "system": "s", "history": ["a"]}
    path = write_jsonl(tmp_path / "data.jsonl", [record])
    settings = FormatSettings("alpaca", prompt_template=str(tmp_path / "prompts.json"))
    assert open_alone(path, make_recipe(format=settings)).remarks == ((UNREAD, "history", 1),)


FUNCTION = """
def of_rows(record):
    return {"messages": record["messages"], "id": record.get("id"), "kept": sorted(record["messages"][0])}
def to_text(record) -> str:
    return str(sorted(record["meta"]))
"""
TEMPLATE = """\
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + m.content }}
{%- for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"""


def call(arguments: dict[str, Any], **fields: Any) -> dict[str, Any]:
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    tools = [{"name": "f", "parameters": {name: {"type": "number"} for name in arguments}}]
    user = {"role": "user", "content": "q", **fields}
    return {"messages": [user, {"role": "assistant", "tool_calls": calls}], "tools": tools}


def test_calls_from_a_table_are_learned_as_those_from_lines(tmp_path: Path) -> None:
    rows = [call({"a": 1}), call({"b": {"c": [1]}}, name="u"), call({}), call({"a": 2, "b": {"d": "x"}})]
    write_jsonl(tmp_path / "lines.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    tokenizer = make_chat_tokenizer(("<|im_start|>", "<|im_end|>"), "<|im_end|>", TEMPLATE)
    recipe = make_recipe(format=FormatSettings("chat"), tokenizer=tokenizer, vocabulary_size=len(tokenizer))
    lines, table = (open_alone(tmp_path / name, recipe) for name in ("lines.jsonl", "table.parquet"))
    for i in range(len(rows)):
        assert table.tokens(i).tolist() == lines.tokens(i).tolist()
        assert table.spans_of(i).tolist() == lines.spans_of(i).tolist()
    assert lines.remarks == ((UNREAD, "messages.name", 1),)
    counts = {field: count for kind, field, count in table.remarks if kind == NULLS}
    arguments = "messages.tool_calls.function.arguments"
    assert counts == {
        f"{arguments}.a": 2,
        f"{arguments}.b": 2,
        f"{arguments}.b.c": 1,
        f"{arguments}.b.d": 1,
        "tools.parameters.a": 2,
        "tools.parameters.b": 2,
    }, "of messages themselves a null says as much as no field"


def test_own_functions_are_given_rows_as_json_lines_have_them(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FUNCTION)
    parquet.write_table(pyarrow.Table.from_pylist([{"meta": {"a": 1}}, {"meta": {"b": 2}}]), tmp_path / "table.parquet")
    recipe = make_recipe(format=FormatSettings(f"{tmp_path}/own.py:to_text"))
    documents = open_alone(tmp_path / "table.parquet", recipe)
    texts = [make_tokenizer().decode(documents.tokens(i), skip_special_tokens=True) for i in range(2)]
    assert texts == ["['a']", "['b']"]
    assert documents.remarks == ((NULLS, "meta.b", 1), (NULLS, "meta.a", 1))
    write_jsonl(tmp_path / "lines.jsonl", [call({}, name="u") | {"id": 5}])
    tokenizer = make_chat_tokenizer(("<|im_start|>", "<|im_end|>"), "<|im_end|>", TEMPLATE)
    settings = FormatSettings(f"{tmp_path}/own.py:of_rows")
    recipe = make_recipe(format=settings, tokenizer=tokenizer, vocabulary_size=len(tokenizer))
    assert open_alone(tmp_path / "lines.jsonl", recipe).remarks == (
        (UNREAD, "id", 1),
        (UNREAD, "kept", 1),
        (UNREAD, "messages.name", 1),
    )


def test_lines_show_the_most_frequent_and_count_the_others() -> None:
    counts = [
        {(UNREAD, f"field{i:03}"): 1 for i in range(120)} | {(UNREAD, "often\n日本"): 1000, (NULLS, "a.b"): 2}
    ] * 2
    joined = remarks.joined(remarks.counted(part) for part in counts)
    assert len(joined) == remarks.MOST_FIELDS
    first, second = remarks.lines(joined)
    assert first.startswith("fields that nothing reads: 'often\\n日本' (2,000 records), 'field000' (2 records), ")
    assert first.endswith(", 89 more (docs/formats.md says what each format reads)")
    assert second.endswith("left out where they are null, as in JSON Lines: 'a.b' (4 records)")
    assert remarks.lines(()) == []
    many = {(UNREAD, f"{random.random()}"): 1 for _ in range(10_000)}
    assert len(remarks.counted(many)) == remarks.MOST_FIELDS


def test_every_source_of_a_run_tells_its_own(tmp_path: Path) -> None:
    """A start and `tools/inspect_data.py` print what a corpus says of itself."""
    sources = [
        rows_of(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": "a dog", name: 1}] * 2)) for name in ("id", "日本")
    ]
    told = [line for line in corpus_of(*sources).describe() if "nothing reads" in line]
    assert told == [
        f"fields that nothing reads: '{name}' (2 records) (docs/formats.md says what each format reads)"
        for name in ("id", "日本")
    ]


def test_small_parts_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts above are sums over parts."""
    cut_small(set_value=monkeypatch.setattr)
    path = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    open_alone(path, make_recipe(cache=tmp_path / "cache"))
    assert len(list(only_store(tmp_path / "cache").glob("parts/*"))) > 2


SPELLED = [
    {"prompt": "<s>the", "completion": " fox"},
    {"prompt": "the", "completion": " fox</s>"},
    {"prompt": "<s><s>", "completion": "a</s></s>"},
    {"prompt": "a <s> b", "completion": " </s> c"},
    {"prompt": "a", "completion": "b"},
]


@pytest.mark.parametrize(("adds_bos", "expected"), [(True, {"<s>": 2, "</s>": 2}), (False, {"<s>": 1, "</s>": 2})])
def test_texts_that_spell_bos_or_eos_beside_the_one_that_is_added_are_counted(
    tmp_path: Path, small_parts: None, adds_bos: bool, expected: dict[str, int]
) -> None:
    del small_parts
    path = write_jsonl(tmp_path / "data.jsonl", SPELLED * 20)
    recipe = make_recipe(tokenizer=make_tokenizer(adds_bos), format=FormatSettings("completion"))
    for documents in documents_on(2, path, recipe):
        assert {(kind, token): count for kind, token, count in documents.remarks} == {
            (TWICE, token): 20 * count for token, count in expected.items()
        }
    (line,) = remarks.lines(documents.remarks)
    assert line.startswith("tokens that begin or end a text stand twice in a row: ")
    assert "'</s>' (40 records)" in line and line.endswith("remove it there")


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}", "x", {}),
        (
            "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
            "<s>x</s>",
            {"<s>": 1, "</s>": 1},
        ),
        ("{% for m in messages %}{{ m.content + eos_token + eos_token }}{% endfor %}", "x", {"</s>": 1}),
        ("{% for m in messages %}{{ m.role + m.content + ' ' }}{% endfor %}", "x</s>", {}),
    ],
)
def test_conversations_count_once_each(tmp_path: Path, template: str, content: str, expected: dict[str, int]) -> None:
    tokenizer = make_chat_tokenizer(("<s>", "</s>"), "</s>", template)
    turns = [{"role": role, "content": content} for role in ("user", "assistant", "user", "assistant")]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": turns}])
    documents = open_alone(
        path, make_recipe(tokenizer=tokenizer, format=FormatSettings("chat"), vocabulary_size=1 << 16)
    )
    assert {token: count for kind, token, count in documents.remarks if kind == TWICE} == expected


def test_one_token_that_begins_and_ends_texts_is_no_repeat_between_two_of_them(tmp_path: Path) -> None:
    """GPT-2's BOS is its EOS: documents lie end to end, and each ends with the token that the next begins with."""
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.eos_token = "<s>"
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "c<s>"}])
    assert open_alone(path, make_recipe(tokenizer=tokenizer)).remarks == ((TWICE, "<s>", 1),)


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"input_ids": [0, 0, 5, 1, 1]}])
    assert open_alone(path, make_recipe(format=FormatSettings("tokens"))).remarks == ()
