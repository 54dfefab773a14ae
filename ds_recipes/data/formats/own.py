"""A user's own format: a function in a file of theirs, from a record to text, messages, or tokens with a mask."""

import dataclasses
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ds_recipes.config.own_function import check_own, split_own
from ds_recipes.data.formats.chat import ChatFormat
from ds_recipes.data.formats.fields import check_string, has, kind
from ds_recipes.data.formats.identity import fingerprint_of
from ds_recipes.data.formats.remarks import NULLS
from ds_recipes.data.formats.sample import Format, FormatSettings, Parts, Sample
from ds_recipes.data.formats.text import CompletionFormat, TextFormat
from ds_recipes.data.formats.token_ids import TokensFormat
from ds_recipes.data.sources.record import Record
from ds_recipes.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Function = Callable[..., Any]

VERSION = "2"
"""Goes up when a function is given other records. 2: without the nulls that tables put into structs."""

MAY_RETURN = (
    "a string, None to leave the record out, or a dictionary with 'text', with 'prompt' and 'completion', with 'messages', "
    "or with 'input_ids'"
)


class OwnFormat:
    """`path/to/file.py:function`. The function is called as function(record) or function(record, tokenizer).

    Raises:
        InputError: the file or the function is missing, or the file cannot be run.
    """

    joins_parts = True

    def __init__(self, settings: FormatSettings, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.name = settings.dataset
        named = split_own(self.name)
        problem = check_own(self.name)
        if named is None or problem is not None:
            raise InputError(f"dataset {self.name}: {problem}.")
        self._file, function_name = named
        content = self._file.read_bytes()
        module = _load(self._file, content, self.name)
        self._function = _function(module, function_name, self.name)
        self._takes_tokenizer = _takes_tokenizer(self._function, self.name)
        self._tokenizer, self._settings = tokenizer, settings
        self._formats: dict[str, Format] = {
            "tokens": TokensFormat(),
            "completion": CompletionFormat(),
            "text": TextFormat(("text",)),
        }
        # Messages are written with the tokenizer's template, which the tokenizer's own fingerprint does not cover.
        has_template = settings.chat_template is not None or bool(tokenizer.chat_template)
        chat = self._format("chat").fingerprint if has_template else ""
        self.fingerprint = fingerprint_of("own", VERSION, function_name, content, chat)
        # A function that says that it returns text is taken for pretraining; other documents lose their end.
        self.splits_long = inspect.signature(self._function).return_annotation in (str, "str", str | None, "str | None")

    def read(self, record: Record) -> Sample | None:
        try:
            value = (
                self._function(record.value, self._tokenizer) if self._takes_tokenizer else self._function(record.value)
            )
        except Exception as error:
            raise InputError(
                f"{record.where}: {self.name} failed with {_what(error, self._file)}. Fix the function or the record."
            ) from error
        if value is None:
            return None
        nulls = tuple((NULLS, field) for field in sorted(record.padding))
        if isinstance(value, str):
            text = check_string(value, f"what {self.name} returned", record.where)
            if not text:
                raise InputError(
                    f"{record.where}: {self.name} returned an empty string, so the record has no target token. "
                    "Return None to leave a record out."
                )
            return Parts(((text, True),), nulls)
        if not isinstance(value, Mapping):
            raise InputError(f"{record.where}: {self.name} returned {kind(value)}; it may return {MAY_RETURN}.")
        returned = {str(name): _plain(part) for name, part in value.items()}
        sample = self._read_as(dataclasses.replace(record, value=returned, padding=frozenset()), record.where)
        return dataclasses.replace(sample, remarks=(*sample.remarks, *nulls))

    def _read_as(self, record: Record, where: str) -> Sample:
        forms = {
            "messages": "chat",
            "conversations": "chat",
            "input_ids": "tokens",
            "completion": "completion",
            "text": "text",
        }
        name = next((forms[field] for field in forms if field in record.value), None)
        if name is None:
            raise InputError(
                f"{where}: {self.name} returned a dictionary that is none of the known ones ({has(record.value)}); it may "
                f"return {MAY_RETURN}."
            )
        chosen = self._format(name)
        try:
            sample = chosen.read(record)
        except InputError as error:
            reason = str(error).removeprefix(f"{where}: ")
            raise InputError(f"{where}: in what {self.name} returned: {reason}") from error
        assert sample is not None, "only functions leave records out"
        return sample

    def _format(self, name: str) -> Format:
        """How a form of what is returned is read. Chat is made when it is first needed: it may lack a template."""
        if name not in self._formats:
            template = self._settings.chat_template
            self._formats[name] = ChatFormat(
                self._tokenizer, Path(template) if template else None, self._settings.chat_targets
            )
        return self._formats[name]


def _load(path: Path, content: bytes, name: str) -> ModuleType:
    """Run the file as a module. Its neighbours can be imported; installed packages come before them."""
    module_name = f"own_format_{fingerprint_of(str(path.resolve()), content)}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    sys.modules[module_name] = module  # as an import does: dataclasses and pickle look there
    try:
        # From the bytes that were read, not through the import system: a compiled file beside it may be an older one.
        exec(compile(content, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise InputError(f"dataset {name}: the file fails with {_what(error, path)}. Fix the file.") from error
    return module


def _function(module: ModuleType, function_name: str, name: str) -> Function:
    function = getattr(module, function_name, None)
    if not callable(function) or inspect.iscoroutinefunction(function):
        found = "missing" if function is None else "async" if callable(function) else kind(function)
        raise InputError(
            f"dataset {name}: {function_name} is {found}, not a plain function. Name a function of the file."
        )
    found_function: Function = function
    return found_function


def _takes_tokenizer(function: Function, name: str) -> bool:
    """True if the function has two parameters that must be given, or a second one that is called tokenizer."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind in positional]
    needed = [p for p in parameters if p.default is inspect.Parameter.empty]
    if not parameters or len(needed) > 2:
        raise InputError(
            f"dataset {name}: the function has {len(needed)} parameters; it must be function(record) or "
            "function(record, tokenizer)."
        )
    return len(needed) == 2 or (len(parameters) > 1 and parameters[1].name == "tokenizer")


def _what(error: BaseException, path: Path) -> str:
    """Type and message of an error, and the line of the user's file that it came from."""
    first_line = (str(error).splitlines() or [""])[0]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    at = f" at {path}:{lines[-1]}" if lines else ""
    return f"{type(error).__name__}{': ' + first_line if first_line else ''}{at}"


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists, so that a function may return what a tokenizer gave it."""
    return value.tolist() if hasattr(value, "tolist") else value
