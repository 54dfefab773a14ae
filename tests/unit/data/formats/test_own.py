"""A function in a file of the user's own: what it may return, and what is said when it fails."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.data.formats.choose import make_format
from ds_recipes.data.formats.sample import FormatSettings, Parts, Rendered, Tokens
from ds_recipes.data.sources.record import Record
from ds_recipes.errors import InputError
from tests.house.tree import ROOT
from tests.unit.data.formats.families import CHATML, make_chat_tokenizer, tokenizer_of
from tests.unit.data.formats.reading import fingerprint, read, refusal, refused_format, write

TOKENIZER = tokenizer_of(CHATML)
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]


def own(folder: Path, code: str, function: str = "f") -> str:
    return f"{write(folder / 'own.py', code)}:{function}"


@pytest.mark.parametrize(
    ("returned", "sample"),
    [
        ("record['a']", Parts((("x", True),))),
        ("None", None),
        ("{'text': record['a']}", Parts((("x", True),))),
        ("{'prompt': '', 'completion': 'c'}", Parts((("", False), ("c", True)))),
        ("{'input_ids': [1, 2], 'target_mask': [0, 1]}", Tokens([1, 2], [False, True])),
        ("{'input_ids': (1, 2), 'labels': [-100, 2], 'attention_mask': [1, 1]}", Tokens([1, 2], [False, True])),
        ("{'input_ids': __import__('numpy').array([1, 2])}", Tokens([1, 2], [True, True])),
        ("{'input_ids': __import__('torch').tensor([1, 2])}", Tokens([1, 2], [True, True])),
    ],
)
def test_what_may_be_returned(tmp_path: Path, returned: str, sample: Any) -> None:
    assert read({"a": "x"}, own(tmp_path, f"def f(record):\n    return {returned}\n"), TOKENIZER) == sample


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_returned_messages_are_read_as_chat(tmp_path: Path, field: str) -> None:
    dataset = own(tmp_path, f"def f(record):\n    return {{'{field}': record['m']}}\n")
    sample = read({"m": MESSAGES}, dataset, TOKENIZER)
    assert isinstance(sample, Rendered)
    assert sample == read({"messages": MESSAGES}, "chat", TOKENIZER)
    last = read({"m": MESSAGES * 2}, dataset, TOKENIZER, chat_targets="last")
    assert last == read({"messages": MESSAGES * 2}, "chat", TOKENIZER, chat_targets="last")


@pytest.mark.parametrize(
    "parameters", ["record, tokenizer", "record, t", "record, tokenizer=None", "record, tokenizer, more=1"]
)
def test_a_function_is_given_the_tokenizer_if_it_asks(tmp_path: Path, parameters: str) -> None:
    name = parameters.split(", ")[1].split("=")[0]
    code = f"def f({parameters}):\n    return {name}(record['a'], add_special_tokens=False)\n"
    sample = read({"a": "yes"}, own(tmp_path, code), TOKENIZER)
    assert sample == Tokens(TOKENIZER("yes", add_special_tokens=False).input_ids, [True])


def test_other_parameters_keep_their_defaults(tmp_path: Path) -> None:
    code = "def f(record, suffix='!'):\n    return record['a'] + suffix\n"
    assert read({"a": "x"}, own(tmp_path, code), TOKENIZER) == Parts((("x!", True),))


def test_neighbours_can_be_imported_and_dataclasses_made(tmp_path: Path) -> None:
    write(tmp_path / "neighbour_of_own_format.py", "def shout(text):\n    return text + '!'\n")
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbour_of_own_format import shout\n"
        "@dataclass\nclass Pair:\n    a: str\ndef f(record):\n    return shout(Pair(record['a']).a)\n"
    )
    assert read({"a": "x"}, own(tmp_path, code), TOKENIZER) == Parts((("x!", True),))


def test_an_edit_is_seen_at_once_and_changes_the_fingerprint(tmp_path: Path) -> None:
    """Also within the second and of the same size, which Python's own cache of compiled files does not notice."""
    fingerprints = []
    for word in ("one", "two"):
        dataset = own(tmp_path, f"def f(record):\n    return '{word}'\n\ndef g(record):\n    return ''\n")
        assert read({}, dataset, TOKENIZER) == Parts(((word, True),))
        fingerprints.append(fingerprint(dataset, TOKENIZER))
    fingerprints += [
        fingerprint(dataset.replace(":f", ":g"), TOKENIZER),
        fingerprint(dataset, TOKENIZER, chat_targets="last"),
        fingerprint(dataset, make_chat_tokenizer(CHATML.specials, CHATML.eos, CHATML.template + " ")),
        fingerprint(dataset, make_chat_tokenizer(CHATML.specials, CHATML.eos, None)),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert not list(tmp_path.rglob("*.pyc"))


@pytest.mark.parametrize(
    ("annotation", "splits"),
    [("", False), (" -> str", True), (" -> 'str'", True), (" -> str | None", True), (" -> dict", False)],
)
def test_long_texts_go_on_in_the_next_row_if_the_function_says_text(
    tmp_path: Path, annotation: str, splits: bool
) -> None:
    dataset = own(tmp_path, f"def f(record){annotation}:\n    return ''\n")
    assert make_format(FormatSettings(dataset), TOKENIZER).splits_long == splits


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("1", "FUNCTION returned a number; it may return a string, None to leave the record out, or a dictionary with "
         "'text', with 'prompt' and 'completion', with 'messages', or with 'input_ids'."),
        ("['a']", "FUNCTION returned an array; it may return a string, None to leave the record out, or a dictionary "),
        ("object()", "FUNCTION returned a Python object of the type object; it may return "),
        ("{'prompt': 'a'}", "FUNCTION returned a dictionary that is none of the known ones (it has 'prompt'); it may "),
        ("{}", "FUNCTION returned a dictionary that is none of the known ones (it has no field at all); it may "),
        ("''", "FUNCTION returned an empty string, so the record has no target token. Return None to leave a record out."),
        ("'\\ud83d'", "what FUNCTION returned has half a UTF-16 pair at character 1, which is no text. Fix or remove "),
        ("{'text': 1}", "in what FUNCTION returned: 'text' is a number, not a string. Fix or remove the record."),
        ("{'messages': []}", "in what FUNCTION returned: the conversation has no assistant turn, so the record has no "),
        ("record['b']", "FUNCTION failed with KeyError: 'b' at FILE:3. Fix the function or the record."),
        ("deeper(record)", "FUNCTION failed with ZeroDivisionError: division by zero at FILE:6. Fix the function or "),
        ("__import__('json').loads('{')", "FUNCTION failed with JSONDecodeError: Expecting property name enclosed in "
         "double quotes: line 1 column 2 (char 1) at FILE:3. Fix the function or the record."),
    ],
)  # fmt: skip
def test_refuses_with_file_and_line(tmp_path: Path, returned: str, message: str) -> None:
    code = f"def f(record):\n    a = 1\n    return {returned}\n\ndef deeper(record):\n    return 1 / 0\n"
    dataset = own(tmp_path, code)
    wanted = message.replace("FUNCTION", dataset).replace("FILE", dataset.removesuffix(":f"))
    assert refusal({"a": "x"}, dataset, TOKENIZER).startswith(wanted)


def test_messages_need_a_template(tmp_path: Path) -> None:
    bare = make_chat_tokenizer(CHATML.specials, CHATML.eos, None)
    dataset = own(tmp_path, "def f(record):\n    return {'messages': record['m']}\n")
    with pytest.raises(
        InputError, match=r"has no chat template, .* Pass --chat_template with the path of a Jinja file"
    ):
        read({"m": MESSAGES}, dataset, bare)
    template = write(tmp_path / "t.jinja", CHATML.template)
    assert isinstance(read({"m": MESSAGES}, dataset, bare, chat_template=template), Rendered)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def g(record):\n    return 1\n", "FILE has no function 'f'; it has g."),
        ("def f(record:\n", "FILE:1 is not Python ('(' was never closed)."),
        (
            "1 / 0\ndef f(record): ...\n",
            "the file fails with ZeroDivisionError: division by zero at FILE:1. Fix the file.",
        ),
        ("raise SystemExit(3)\ndef f(record): ...\n", "the file fails with SystemExit: 3 at FILE:1. Fix the file."),
        ("import none_of_this_name\ndef f(record): ...\n", "the file fails with ModuleNotFoundError: No module named "),
        ("f = 3\n", "f is a number, not a plain function. Name a function of the file."),
        ("async def f(record): ...\n", "f is async, not a plain function. Name a function of the file."),
        (
            "def f(): ...\n",
            "the function has 0 parameters; it must be function(record) or function(record, tokenizer).",
        ),
        ("def f(a, b, c): ...\n", "the function has 3 parameters; it must be function(record) or "),
    ],
)
def test_refuses_a_file_that_cannot_be_used(tmp_path: Path, code: str, message: str) -> None:
    dataset = own(tmp_path, code)
    wanted = f"dataset {dataset}: {message}".replace("FILE", dataset.removesuffix(":f"))
    assert refused_format(dataset, TOKENIZER).startswith(wanted)


def test_the_example_reads_the_records_that_its_run_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    example = make_format(FormatSettings("examples/own_format.py:read_record"), TOKENIZER)
    value = {"instruction": "What does it do?", "input": "def f(x)", "output": "It adds\n one to x."}
    assert example.read(Record("a", 1, 0, value)) == Parts(
        (("質問: What does it do?\ndef f(x)\n回答: ", False), ("It adds one to x.", True))
    )
    assert example.read(Record("a", 2, 1, {"instruction": "q", "output": "f(x)"})) is None
    run = (ROOT / "examples" / "tiny_own_format.yaml").read_text(encoding="utf-8")
    assert "\ndataset: examples/own_format.py:read_record\n" in run
    lines = (ROOT / "embedded" / "alpaca.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [example.read(Record("a", i, i, json.loads(line))) for i, line in enumerate(lines)]
    left_out = sum(sample is None for sample in samples)
    assert 0 < left_out < len(samples) / 2
