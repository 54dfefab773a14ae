"""The `chat` format: a conversation as the model's chat template writes it, of which assistant turns are learned."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_recipes.data.formats.conversation import Conversation, Message, read_conversation, with_json_arguments
from ds_recipes.data.formats.fields import check_string, is_text
from ds_recipes.data.formats.identity import fingerprint_of
from ds_recipes.data.formats.remarks import NULLS, UNREAD, Remark
from ds_recipes.data.formats.sample import Rendered
from ds_recipes.data.formats.turns import Whole
from ds_recipes.data.sources.record import Record
from ds_recipes.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = "2"
"""Goes up when the same record makes other messages. 2: all fields of ShareGPT's, `train` and `loss`, nulls of tables."""

CHECKED = ("role", "content", "tool_calls")
"""Fields of a message of which others see that the template writes them."""

DEFAULT, TOOL_USE = "default", "tool_use"
"""The names that transformers gives templates where a tokenizer has several."""

# Some templates write today's date, and a run must be the same on every day. This one is what Llama 3.1's template
# falls back to. A macro of the template comes before the global of its name; the line break goes, as after any block.
DATE = {"%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%b": "Jul", "%B": "July", "%A": "Friday", "%a": "Fri"}
TIME = {"%H": "00", "%M": "00", "%S": "00"}
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace({code!r}, {value!r})" for code, value in (DATE | TIME).items())
    + " }}{% endmacro %}\n"
)


class ChatFormat:
    """{"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}, with "system" and "tools" if wanted.

    Raises:
        InputError: the tokenizer has no chat template and no file was given, or it is no Jinja template.
    """

    name = "chat"
    splits_long = False
    joins_parts = True

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: Path | None, targets: str) -> None:
        self._tokenizer = tokenizer
        self._only_last = targets == "last"
        self._templates = {DEFAULT: _read(template)} if template else _of_tokenizer(tokenizer)
        for name, text in self._templates.items():
            _check_syntax(tokenizer, text, str(template) if template else f"the tokenizer's chat template {name!r}")
        self._ends = _end_tokens(tokenizer, self._templates)
        self.fingerprint = fingerprint_of(
            self.name,
            VERSION,
            targets,
            *(part for item in sorted(self._templates.items()) for part in item),
            FIXED_DATE,
            repr(sorted(tokenizer.special_tokens_map.items())),
            repr(self._ends),
        )

    def read(self, record: Record) -> Rendered:
        conversation, where = read_conversation(record), record.where
        turns = conversation.turns[-1:] if self._only_last else conversation.turns
        messages = conversation.messages[: turns[-1] + 1]  # what comes later is never predicted from
        template = self._template_for(conversation, where)
        render = partial(self._render, template, conversation.tools, where)
        whole = Whole(render, messages, self._ends, where, conversation.first_number)
        try:
            text = whole.text
        except InputError:
            if not any("tool_calls" in message for message in messages):
                raise
            # Some templates, such as DeepSeek's, add the arguments of a call to a string.
            whole = replace(whole, messages=[with_json_arguments(message) for message in messages])
            text = whole.text
        if not is_text(text):
            for number, message in enumerate(messages, conversation.first_number):
                check_string(message["content"], f"'content' of message {number}", where)
            check_string(text, "the text of the conversation", where)
        targets = whole.ranges(turns)
        text = text[: targets[-1][1]]
        remarks = (*conversation.remarks, *_unread_in(whole), *_unwritten_in(whole), *_nulls_in(record))
        return Rendered(text, tuple(targets), text.endswith(self._ends), remarks)

    def _template_for(self, conversation: Conversation, where: str) -> str:
        name = TOOL_USE if conversation.tools and TOOL_USE in self._templates else DEFAULT
        template = self._templates[name]
        uses = {"tools": bool(conversation.tools), "tool_calls": any("tool_calls" in m for m in conversation.messages)}
        for field, is_used in uses.items():
            if is_used and field not in template:
                raise InputError(
                    f"{where}: the record has '{field}', but the chat template does not write them. Pass --chat_template "
                    "with a Jinja file that does, or remove the record."
                )
        return FIXED_DATE + template if "strftime_now" in template else template

    def _render(
        self,
        template: str,
        tools: list[dict[str, Any]] | None,
        where: str,
        messages: Sequence[Message],
        generation_prompt: bool,
    ) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except TemplateError as error:
            raise _refused(where, error.message or type(error).__name__) from error
        except Exception as error:  # a template can fail as any program can, say by adding a number to a string
            raise _refused(where, f"{type(error).__name__}: {error}") from error
        return str(text)


def _unread_in(whole: Whole) -> Iterator[Remark]:
    """Remarks on fields of messages that the text does not depend on. Templates say in many ways what they read."""
    names = dict.fromkeys(name for message in whole.messages for name in message if name not in CHECKED)
    if not names:
        return
    unread = list(names) if _is_same_without(names, whole) else []
    if not unread and len(names) > 1:
        unread = [name for name in names if _is_same_without((name,), whole)]
    yield from ((UNREAD, f"messages.{name}") for name in unread)


def _is_same_without(names: Collection[str], whole: Whole) -> bool:
    return _is_same_of(
        whole, [{name: value for name, value in message.items() if name not in names} for message in whole.messages]
    )


def _unwritten_in(whole: Whole) -> Iterator[Remark]:
    """Remarks on messages that the template leaves out: of a role that it does not know, say.

    A template may write a content in other words, as JSON, so whether the text depends on it is tried.
    """
    contents = [message["content"].strip() for message in whole.messages]
    missing = [i for i, content in enumerate(contents) if content and content not in whole.text]
    for role in dict.fromkeys(whole.messages[i]["role"] for i in missing):
        without = list(whole.messages)
        for i in missing:
            if without[i]["role"] == role:
                without[i] = without[i] | {"content": ""}
        if _is_same_of(whole, without):
            yield UNREAD, f"messages.content of the role {role}"


def _is_same_of(whole: Whole, messages: Sequence[Message]) -> bool:
    try:
        return whole.render(messages, False) == whole.text
    except InputError:
        return False


def _nulls_in(record: Record) -> Iterator[Remark]:
    """Remarks on what was left out of the arguments of calls and of the tools; elsewhere a null says as much as no field."""
    for field in sorted(record.padding):
        if ".arguments." in field or field.startswith("tools."):
            yield NULLS, field


def _refused(where: str, reason: str) -> InputError:
    return InputError(
        f"{where}: the chat template refuses the conversation ({reason}). Fix or remove the record, or pass "
        "--chat_template with a Jinja file that takes it."
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{path}: the chat template cannot be read ({reason}). Check --chat_template.") from error


def _of_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """The templates that can be used, by name."""
    given = tokenizer.chat_template
    templates = given if isinstance(given, dict) else {DEFAULT: given} if given else {}
    if DEFAULT in templates:
        return {name: templates[name] for name in (DEFAULT, TOOL_USE) if name in templates}
    found = (
        f"has chat templates of the names {', '.join(templates)}, none is 'default'"
        if templates
        else "has no chat template"
    )
    raise InputError(
        f"tokenizer {tokenizer.name_or_path}: {found}, so conversations cannot be written as text. Pass --chat_template "
        "with the path of a Jinja file, or set --tokenizer_name to the tokenizer of a chat model."
    )


def _check_syntax(tokenizer: "PreTrainedTokenizerBase", template: str, name: str) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise InputError(f"{name}:{error.lineno}: not a Jinja template ({error.message}). Fix the template.") from error
    except Exception:  # it may well refuse this conversation; what it says of real ones is told with their place
        return


def _end_tokens(tokenizer: "PreTrainedTokenizerBase", templates: dict[str, str]) -> tuple[str, ...]:
    """Texts of tokens that can end a turn: special ones, and added ones that a template itself writes. Longest first."""
    written = "".join(templates.values())
    tokens = tokenizer.added_tokens_decoder.values()
    ends = {
        str(token.content) for token in tokens if token.content.strip() and (token.special or token.content in written)
    }
    return tuple(sorted(ends | {str(tokenizer.eos_token)}, key=lambda end: (-len(end), end)))
