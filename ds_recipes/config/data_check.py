"""Checks of the files that the settings of the data name. Reads this host's files, no network, no torch."""

from collections.abc import Iterator
from pathlib import Path

from ds_recipes.config.data_paths import find_files, parse_data_path
from ds_recipes.config.data_settings import FORMATS
from ds_recipes.config.missing import similar, where_given
from ds_recipes.config.own_function import check_own
from ds_recipes.config.schema import Config, values_of

OPENED_FILES = 100
"""Of a folder with more files than that, only the first so many are opened; all are looked at."""


def data_files(config: Config, name: str) -> Iterator[str]:
    """What is wrong with the files of `train_data` or `validation_data`, a line each. Hub data are not looked for."""
    for text in values_of(config)[name]:
        path = parse_data_path(text)
        if path.hub is not None:
            continue
        where, hint = where_given(config, name, text), ""
        if path.weight is not None:
            hint = f". What stands before the first colon was read as its weight; a path that begins so is written ./{text}"
            if Path(text).exists():
                yield f"{where}: there is {text}, but {path.weight:g} was read as a weight of {path.text}. Write ./{text}"
                continue
        try:
            files = find_files(path.text)
        except ValueError as error:
            yield f"{where}: {error}{hint}"
            continue
        for number, file in enumerate(files):
            yield from _file(where, file, file == Path(path.text), number < OPENED_FILES, hint)


def format_files(config: Config) -> Iterator[str]:
    """What is wrong with the templates and the function of the user's own that make records into text."""
    for name in ("prompt_template", "chat_template"):
        text = values_of(config)[name]
        if text is not None and not Path(text).is_file():
            problem = (
                "is a folder; name a file" if Path(text).is_dir() else f"there is no such file{similar(Path(text))}"
            )
            yield f"{where_given(config, name, text)}: {problem}"
    if config.data.dataset not in FORMATS:
        own_problem = check_own(config.data.dataset)
        if own_problem is not None:
            yield f"{where_given(config, 'dataset', config.data.dataset)}: {own_problem}"


def _file(where: str, file: Path, is_named: bool, opens: bool, hint: str) -> Iterator[str]:
    which = where if is_named else f"{where}: {file}"
    try:
        if not file.exists():
            yield f"{which}: there is no such file{similar(file)}{hint}"
        elif is_named and file.is_file() and file.stat().st_size == 0:
            yield f"{which}: the file is empty; name one with a JSON object a line, or a JSON array"
        elif file.is_file() and opens:
            with file.open("rb") as opened:
                opened.read(1)
    except OSError as error:
        yield f"{which}: cannot be read: {error.strerror}"
