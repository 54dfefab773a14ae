"""Conversations as records hold them (OpenAI's `messages`, ShareGPT's `conversations`), as messages for a chat template."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ds_recipes.data.formats.fields import has, kind
from ds_recipes.data.formats.remarks import UNREAD, Remark, is_blank, unread
from ds_recipes.data.sources.record import Record
from ds_recipes.errors import InputError

Message = dict[str, Any]

LISTS = ("messages", "conversations")
PROMPT_AND_ANSWER = ("prompt", "completion")
"""Both arrays of messages, as TRL has them: the first are read only."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}
MAY_BE_LEARNED = ("weight", "train", "training", "loss", "loss_scale")
"""Fields of a message that say whether it is learned: OpenAI's, Axolotl's and ms-swift's."""

LEARNED_IN_PART = ("train_detail", "training_detail")
"""Axolotl's ranges of a turn that are learned."""

FIX = "Fix or remove the record."


@dataclass(frozen=True)
class Conversation:
    """Messages that all have a 'role' and a string as 'content'."""

    messages: list[Message]
    turns: tuple[int, ...]  # the messages that may be learned, from 0
    tools: list[dict[str, Any]] | None
    first_number: int  # of the first message as the record counts them: 0 is a system prompt of the record itself
    remarks: tuple[Remark, ...]


def read_conversation(record: Record) -> Conversation:
    """The conversation of a record.

    Raises:
        InputError: a field is missing or wrong, a role is unknown, or there is no assistant turn to learn.
    """
    value, where = record.value, record.where
    names = _names_of_messages(value, where)
    lists = [_messages(value[name], name, where) for name in names]
    given = [message for each in lists for message in each]
    num_read = len(lists[0]) if names == PROMPT_AND_ANSWER else 0
    messages, learned, remarks = [], [], dict.fromkeys(unread(value, (*names, "system", "tools")))
    for number, message in enumerate(given, 1):
        place = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise InputError(f"{place} is {kind(message)}, not an object with 'role' and 'content'. {FIX}")
        messages.append(_sharegpt(message, place) if _is_sharegpt(message) else _openai(message, place))
        learned.append(_is_learned(message, place) and number > num_read)
        remarks |= dict.fromkeys((UNREAD, f"messages.{field}") for field in _unread_in(message, messages[-1]["role"]))
    has_system = _add_system(messages, learned, value, where)
    turns, tools = _turns(messages, learned, where), _tools(value.get("tools"), f"{where}: the record")
    return Conversation(messages, turns, tools, 0 if has_system else 1, tuple(remarks))


def with_json_arguments(message: Message) -> Message:
    """The message with the arguments of its tool calls as JSON texts, for templates that want them so."""
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
    calls = [
        call | {"function": function | {"arguments": text}}
        for call, function, text in zip(message["tool_calls"], functions, texts, strict=True)
    ]
    return message | {"tool_calls": calls}


def _unread_in(message: Message, role: str) -> Iterator[str]:
    """What no template ever sees of a message."""
    if role != "assistant":
        # Others are not learned, whatever such a field says. A weight of 1 is often written to all.
        asked = (field for field in MAY_BE_LEARNED if field != "weight" and message.get(field))
        yield from (f"{field} of other turns than the assistant's" for field in asked)
    if isinstance(message.get("content"), list | tuple):
        for part in message["content"]:  # of text, all of them
            yield from (f"content.{field}" for _, field in unread(part, ("type", "text")))


def _names_of_messages(value: dict[str, Any], where: str) -> tuple[str, ...]:
    """Which fields hold the messages. Where sets are joined a record has several, of which others are null or empty."""
    present = [name for name in LISTS if value.get(name) is not None]
    name = next((name for name in present if not is_blank(value[name])), None)
    if name is None and all(isinstance(value.get(name), list | tuple) for name in PROMPT_AND_ANSWER):
        return PROMPT_AND_ANSWER
    name = name or next(iter(present), None)
    if name is None:
        raise InputError(
            f"{where}: the record has no field 'messages' or 'conversations' ({has(value)}). Add it, or set --dataset to "
            "the format that the file has."
        )
    return (name,)


def _messages(given: object, name: str, where: str) -> list[Any]:
    if isinstance(given, str):
        given = _json(given, f"'{name}'", f"{where}: the record")
    if not isinstance(given, list | tuple):
        raise InputError(f"{where}: '{name}' is {kind(given)}, not an array of messages. {FIX}")
    return list(given)


def _turns(messages: list[Message], learned: list[bool], where: str) -> tuple[int, ...]:
    assistant = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    turns = tuple(number for number in assistant if learned[number])
    if not turns:
        names = ", ".join(MAY_BE_LEARNED)
        found = (
            f"every assistant turn is one that is not learned, by its {names} or as part of a prompt"
            if assistant
            else "the conversation has no assistant turn"
        )
        raise InputError(f"{where}: {found}, so the record has no target token. Add one or remove the record.")
    return turns


def _add_system(messages: list[Message], learned: list[bool], value: dict[str, Any], where: str) -> bool:
    """Put a system prompt of the record itself before the messages; False if it has none."""
    system = value.get("system")
    if system is None or system == "":
        return False
    if not isinstance(system, str):
        raise InputError(f"{where}: 'system' is {kind(system)}, not a string. {FIX}")
    if messages and messages[0]["role"] == "system":
        raise InputError(f"{where}: the record has 'system' and begins with a system message too. Keep one of them.")
    messages.insert(0, {"role": "system", "content": system})
    learned.insert(0, False)
    return True


def _openai(message: Message, place: str) -> Message:
    role = message.get("role")
    if role is None:
        raise InputError(f"{place} has no field 'role' ({has(message)}). {FIX}")
    if role not in ROLES:
        raise InputError(f"{place} has the role {role!r:.60}, which is none of {', '.join(ROLES)}. {FIX}")
    read = {name: value for name, value in message.items() if value is not None and name not in MAY_BE_LEARNED}
    calls = [_tool_call(call, place) for call in _list(read.pop("tool_calls", []), "'tool_calls'", place)]
    if calls:
        read["tool_calls"] = calls
    read["content"] = _content(message, place, may_be_null=bool(calls))
    return _checked(read, place)


def _is_sharegpt(message: Message) -> bool:
    """True for {"from", "value"}, also where a set that was joined with others has an empty role and content beside them."""
    return message.get("from") is not None and (message.get("value") is not None or message.get("role") is None)


def _sharegpt(message: Message, place: str) -> Message:
    """The message in OpenAI's words, its other fields as they are."""
    sender = message["from"]
    role = SHAREGPT_ROLES.get(sender.lower()) if isinstance(sender, str) else None
    if role is None:
        raise InputError(f"{place} is from {sender!r:.60}, which is none of {', '.join(SHAREGPT_ROLES)}. {FIX}")
    value = message.get("value")
    if not isinstance(value, str) and not (value is None and message.get("tool_calls")):
        found = f"no field 'value' ({has(message)})" if "value" not in message else f"as 'value' {kind(value)}"
        raise InputError(f"{place} has {found}; it must be a string. {FIX}")
    is_call = sender.lower() == "function_call"
    same: dict[str, tuple[Any, ...]] = {"role": (None, role, sender), "content": (None, "", value)}
    same |= {"tool_calls": (None, [])} if is_call else {}
    twice = next((name for name, values in same.items() if message.get(name) not in values), None)
    if twice is not None:
        raise InputError(f"{place} has 'from' and 'value', and something else as '{twice}'. Keep one of them. {FIX}")
    others = {name: given for name, given in message.items() if name not in ("from", "value", "role", "content")}
    if not is_call:
        return _openai({"role": role, "content": value} | others, place)
    called = _json(str(value), "'value' of a function_call", place)
    calls = called if isinstance(called, list) else [called]
    return _openai({"role": role, "content": None} | others | {"tool_calls": calls}, place)


def _checked(message: Message, place: str) -> Message:
    if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
        raise InputError(
            f"{place} is an assistant turn without content or tool calls, so nothing of it can be learned. "
            "Fill it in or remove the record."
        )
    return message


def _content(message: Message, place: str, may_be_null: bool) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if may_be_null:
            return ""
        found = "null as 'content'" if "content" in message else f"no field 'content' ({has(message)})"
        raise InputError(f"{place} has {found}; only a message with tool_calls may go without. {FIX}")
    if not isinstance(content, list | tuple):
        raise InputError(f"{place} has {kind(content)} as 'content', not a string or an array of text parts. {FIX}")
    return "".join(_part(part, place) for part in content)


def _part(part: object, place: str) -> str:
    what = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) and what == "text" else None
    if not isinstance(text, str):
        found = f"of the type {what!r:.60}" if isinstance(part, dict) and what != "text" else "without text"
        raise InputError(
            f"{place} has a content part {found}; only parts {{'type': 'text', 'text': ...}} can be read. {FIX}"
        )
    return text


def _tool_call(call: object, place: str) -> dict[str, Any]:
    """The call with its arguments as an object: templates write them as JSON, and would quote a string once more."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{place} has a tool call that is no object with a function's 'name' and 'arguments'. {FIX}")
    given = "arguments" if function.get("arguments") is not None else "parameters"  # as Llama 3 writes its calls
    arguments = function.get(given)
    if isinstance(arguments, str):
        arguments = _json(arguments, f"'{given}' of a tool call", place) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise InputError(f"{place} has a tool call whose '{given}' are {kind(arguments)}, not an object. {FIX}")
    inner = {name: value for name, value in function.items() if name != given} | {"arguments": arguments}
    if function is call:  # {"name", "arguments"} alone
        inner, outer = {name: inner[name] for name in ("name", "arguments")}, inner
    else:
        outer = call
    others = {name: value for name, value in outer.items() if name not in ("function", *inner) and value is not None}
    return {"type": "function"} | others | {"function": inner}


def _tools(tools: object, place: str) -> list[dict[str, Any]] | None:
    listed = [
        _json(tool, "a tool in 'tools'", place) if isinstance(tool, str) else tool
        for tool in _list(tools, "'tools'", place)
    ]
    wrong = next((tool for tool in listed if not isinstance(tool, dict)), None)
    if wrong is not None:
        raise InputError(f"{place} has {kind(wrong)} in 'tools', not only objects that describe a tool. {FIX}")
    return listed or None


def _list(value: object, name: str, place: str) -> list[Any]:
    """An array, or its JSON, as tables keep it."""
    if isinstance(value, str):
        value = _json(value, name, place) if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise InputError(f"{place} has {kind(value)} as {name}, not an array. {FIX}")
    return list(value)


def _json(text: str, name: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise InputError(f"{place} has {name} that is not JSON ({reason}: {text!r:.60}). {FIX}") from error


def _is_learned(message: Message, place: str) -> bool:
    """False for a turn that is read only: one of its fields is 0 or false."""
    for name in MAY_BE_LEARNED:
        if message.get(name) is not None and message[name] not in (0, 1):
            raise InputError(
                f"{place} has the {name} {message[name]!r:.60}; it must be 0 (not learned) or 1. Turns cannot count for more "
                f"or less than others. {FIX}"
            )
    for name in LEARNED_IN_PART:
        if message.get(name):
            raise InputError(
                f"{place} has '{name}', but a turn is learned as a whole or not at all. Set 'train' of the turn, and leave "
                f"'{name}' out."
            )
    return all(message.get(name) in (None, 1) for name in MAY_BE_LEARNED)
