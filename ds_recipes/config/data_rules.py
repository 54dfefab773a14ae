"""What must hold between the settings of the data; see rules.py."""

import re
from collections.abc import Callable, Iterator

from ds_recipes.config.data_paths import DataPath, parse_data_path
from ds_recipes.config.data_settings import FORMATS
from ds_recipes.config.draft import Draft
from ds_recipes.config.entries import nearest
from ds_recipes.config.values import one_of

OWN_FUNCTION = re.compile(r".+\.py:[A-Za-z_]\w*")
POSITIONS = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


def parse_positions(text: str) -> tuple[int, int]:
    """'12000-12511' or '7' as a half-open range of positions.

    Raises:
        ValueError: it is neither; the message completes "NAME ".
    """
    match = POSITIONS.fullmatch(text.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if last < first or last >= 2**62:
        raise ValueError(f"must be positions such as 12000-12511, not {text!r}")
    return first, last + 1


def _dataset(draft: Draft) -> Iterator[str]:
    name = draft.values["dataset"]
    if name in FORMATS or OWN_FUNCTION.fullmatch(name):
        return
    if ".py" in name:
        yield f"{draft.describe('dataset')}: name a function of your own as path/to/file.py:function"
        return
    guess = nearest(name, FORMATS)
    hint = f"; did you mean {guess}?" if guess else ""
    yield f"{draft.describe('dataset')}: must be {one_of((*FORMATS, 'path/to/file.py:function'))}{hint}"


def _format_options(draft: Draft) -> Iterator[str]:
    name = draft.values["dataset"]
    own = OWN_FUNCTION.fullmatch(name) is not None
    for option, formats in (
        ("text_fields", ("text",)),
        ("prompt_template", ("alpaca",)),
        ("chat_template", ("chat",)),
        ("chat_targets", ("chat",)),
    ):
        if draft.is_given(option) and name not in formats and not (own and formats == ("chat",)):
            yield f"{draft.describe(option)} has no effect: {draft.describe('dataset')}. Leave one of them out."


def _train_data(draft: Draft) -> Iterator[str]:
    if draft.values["train_data"]:
        return
    if draft.seed_dataset:
        file = "alpaca_data.json" if draft.values["dataset"] == "alpaca" else "wikipedia.jsonl"
        yield (
            f"dataset is {draft.seed_dataset} ({draft.origins['dataset']}), but train_data is not set: the path is no longer "
            f"kept in the source, so give it as --train_data path/to/{file}"
        )
    else:
        yield "train_data is not set: name one or more files, globs or folders with --train_data"


def _paths(draft: Draft) -> Iterator[str]:
    for name in ("train_data", "validation_data"):
        paths: list[DataPath] = []
        for text in draft.values[name]:
            try:
                paths.append(parse_data_path(text))
            except ValueError as error:
                yield f"{name} {error} ({draft.origins[name]})"
        with_weight = [path for path in paths if path.weight is not None]
        if name == "validation_data" and with_weight:
            yield f"{draft.describe(name)}: validation data take no weights. Name the path alone."
        elif with_weight and len(with_weight) < len(paths):
            plain = next(path for path in paths if path.weight is None)
            yield (
                f"{draft.describe(name)}: {plain.text} has no weight, but {with_weight[0].text} has {with_weight[0].weight:g}. "
                "Give every path one, or none; a path whose own name begins like a weight is written ./NAME."
            )
        twice = {path.text for path in paths if [other.text for other in paths].count(path.text) > 1}
        if twice:
            yield (
                f"{draft.describe(name)}: {min(twice)} is named twice. Name it once; a weight makes it come more often."
            )


def _held_out(draft: Draft) -> Iterator[str]:
    if draft.values["validation_split"] is not None and draft.values["validation_data"]:
        yield f"{draft.describe('validation_split')}, but {draft.describe('validation_data')}. Leave one of them out."


def _validation(draft: Draft) -> Iterator[str]:
    asked = draft.origins["run_validation"] == "command line" and draft.values["run_validation"]
    if asked and not draft.values["validation_data"] and draft.values["validation_split"] is None:
        yield (
            f"{draft.describe('run_validation')}, but validation_data is not set: name its files with --validation_data, or "
            "hold out a fraction of the training data with --validation_split"
        )


def _truncation(draft: Draft) -> Iterator[str]:
    if draft.values["packing"] == "concat" and draft.values["truncation"] not in (None, "split"):
        yield (
            f"{draft.describe('packing')}, but {draft.describe('truncation')}: a stream is cut where a row ends, so every long "
            "document is split. Leave truncation out, or use packing documents."
        )


def _skip_samples(draft: Draft) -> Iterator[str]:
    for text in draft.values["skip_samples"]:
        try:
            parse_positions(text)
        except ValueError as error:
            yield f"skip_samples {error} ({draft.origins['skip_samples']})"


def _vocabulary(draft: Draft) -> Iterator[str]:
    special, plain = draft.values["added_tokens"], draft.values["added_plain_tokens"]
    for name, tokens in (("added_tokens", special), ("added_plain_tokens", plain)):
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice:
            yield f"{name} has {twice[0]!r} twice ({draft.origins[name]}). Name it once."
    if both := sorted({*special} & {*plain}):
        yield (
            f"added_tokens ({draft.origins['added_tokens']}) and added_plain_tokens ({draft.origins['added_plain_tokens']}) both "
            f"have {both[0]!r}. A token is special or part of the text: name it in one of them."
        )
    if draft.values["eos_token"] in plain:
        yield (
            f"{draft.describe('eos_token')}, but it is in added_plain_tokens ({draft.origins['added_plain_tokens']}). A token that "
            "ends texts is special: name it in added_tokens."
        )
    grows = special or plain or draft.values["pad_vocabulary_to"] is not None
    if draft.is_given("new_token_init") and not grows:
        yield (
            f"{draft.describe('new_token_init')} has no effect: no rows are added. Name tokens with --added_tokens or "
            "--added_plain_tokens, or leave it out."
        )


DATA_RULES: tuple[tuple[tuple[str, ...], Callable[[Draft], Iterator[str]]], ...] = (
    (("dataset",), _dataset),
    (("dataset", "text_fields", "prompt_template", "chat_template", "chat_targets"), _format_options),
    (("dataset", "train_data"), _train_data),
    (("train_data", "validation_data"), _paths),
    (("validation_split", "validation_data"), _held_out),
    (("run_validation", "validation_data", "validation_split"), _validation),
    (("packing", "truncation"), _truncation),
    (("skip_samples",), _skip_samples),
    (("added_tokens", "added_plain_tokens", "eos_token", "new_token_init", "pad_vocabulary_to"), _vocabulary),
)
