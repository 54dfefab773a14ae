"""A DeepSpeed JSON is read as DeepSpeed reads it: strictly, or as Hjson with a note."""

from pathlib import Path

import pytest

from ds_recipes.config.ds.read import HJSON_NOTE, read_json
from tests.unit.config.settings import load, problems_of

WITH_COMMENTS = """{
  // for the large model
  "zero_optimization": {
    "stage": 3,  # all of it
    /* tuned on our
       cluster */
    "reduce_bucket_size": 5e8,
  },
  "bf16": {"enabled": "auto"},
}
"""

BAD_TEXTS = {
    "": "x.json:1: not JSON: the file is empty",
    " \n": "x.json:1: not JSON: the file is empty",
    "[]": "x.json: must hold an object, {...}",
    '{"a": 1 "b": 2}': "x.json:1: not JSON: Expecting ',' delimiter (column 9)",
    '{"a": 1': "x.json:1: not JSON: Expecting ',' delimiter (column 8)",
    "{\"a\": '''": "x.json:1: not JSON: Expecting value (column 7)",
    '{"a": NaN}': "x.json: NaN is not a number that can be used",
    '{"a": -Infinity}': "x.json: -Infinity is not a number that can be used",
    '{"bf16": {}, "bf16": {}}': "x.json: bf16 stands twice in one object",
    '{\n// once\n"bf16": {},\n"bf16": {},\n}': "x.json: bf16 stands twice in one object",
    '{\n// comment\n"a": {\n"b": 1,\n': "x.json:5: not JSON: Bad key name (eof) (column 1)",
}


def test_comments_and_loose_commas_are_read_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text(WITH_COMMENTS, encoding="utf-8")
    config = load("--ds_config x.json")
    assert config.ds is not None
    assert config.ds.tree["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 500_000_000}
    assert config.ds.notes == (f"x.json {HJSON_NOTE}",)


def test_strict_json_has_no_note(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": {"b": [1, 2.5, null, true, "auto"]}}', encoding="utf-8")
    assert read_json(str(path)) == ({"a": {"b": [1, 2.5, None, True, "auto"]}}, ())


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_text_that_is_neither_is_one_line(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text(text, encoding="utf-8")
    assert problems_of("--ds_config x.json") == (BAD_TEXTS[text],)


def test_a_text_without_quotes_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hjson reads `3x` up to the end of the line as a text; nothing takes it for a stage."""
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text('{\n"zero_optimization": {"stage": 3, "overlap_comm": nope\n},\n}', encoding="utf-8")
    assert problems_of("--ds_config x.json") == (
        'x.json: zero_optimization.overlap_comm must be true or false or "auto", not "nope"',
    )


def test_a_number_beyond_all_numbers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ('{"zero_optimization": {"stage": 3}, "gradient_clipping": 1e999}', '{"gradient_clipping": 1e999,\n}'):
        Path("x.json").write_text(text, encoding="utf-8")
        assert len(problems_of("--ds_config x.json")) == 1
