"""Conversations in both spellings become the messages that templates expect; what is wrong is named with its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.data.formats.sample import Rendered
from tests.unit.data.formats.families import (
    CHATML,
    DEEPSEEK,
    FAMILIES,
    GEMMA,
    LLAMA3,
    MISTRAL_3,
    make_chat_tokenizer,
    tokenizer_of,
)
from tests.unit.data.formats.reading import fingerprint, read, refusal, refused_format, write

# Writes tools and their calls in the manner of Hermes and Qwen; consecutive results share one user turn.
TOOLS_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<result>' + m.content + '</result>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- else %}
{{- '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls %}
{{- '<call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '</call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "yes"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def marked(sample: Any) -> str:
    """A rendered text with its targets in brackets."""
    assert isinstance(sample, Rendered)
    text, end = "", 0
    for start, stop in sample.targets:
        text += f"{sample.text[end:start]}⟦{sample.text[start:stop]}⟧"
        end = stop
    return text + sample.text[end:]


def chat(value: dict[str, Any], family: Any = CHATML, **settings: Any) -> str:
    return marked(read(value, "chat", tokenizer_of(family), **settings))


CHATML_TEXT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧"


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER, USER]},  # what comes behind the last learned turn is never predicted from
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "yes"}]},
        {"conversations": [{"from": "User", "value": "q"}, {"from": "bard", "value": "yes", "weight": 1}]},
        {"conversations": [USER, ANSWER], "messages": None},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "q"}]},
                ANSWER,
            ]
        },
        {"messages": [USER | {"name": None, "weight": 0}, ANSWER | {"tool_calls": []}], "tools": [], "system": ""},
    ],
)
def test_spellings_of_one_conversation(value: dict[str, Any]) -> None:
    assert chat(value) == CHATML_TEXT


def test_a_system_prompt_of_the_record_comes_first() -> None:
    system = "<|im_start|>system\ns<|im_end|>\n"
    assert chat({"system": "s", "messages": [USER, ANSWER]}) == system + CHATML_TEXT
    assert chat({"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}) == system + CHATML_TEXT


def test_weight_0_and_the_last_turn() -> None:
    value = {"messages": [USER, ANSWER, USER, ANSWER | {"weight": 0}, USER, ANSWER | {"content": "no"}, USER]}
    turn = "<|im_start|>assistant\n{}\n".format
    user = "<|im_start|>user\nq<|im_end|>\n"
    assert (
        chat(value)
        == user + turn("⟦yes<|im_end|>⟧") + user + turn("yes<|im_end|>") + user + turn("⟦no<|im_end|>⟧").strip()
    )
    assert chat(value, chat_targets="last") == chat(value).replace("⟦yes<|im_end|>⟧", "yes<|im_end|>")
    value["messages"][5] |= {"weight": 0}
    assert chat(value, chat_targets="last") == user + turn("⟦yes<|im_end|>⟧").strip()


CALL = {"name": "add", "arguments": {"x": "日本", "n": [1]}}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}
THINK_TEMPLATE = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.thinking %}{{ '<think>' + m.thinking + '</think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
DUMP_TEMPLATE = "{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}"
GREETING = {"from": "human", "value": "q"}


def thinking(value: dict[str, Any], **settings: Any) -> Rendered:
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", THINK_TEMPLATE)
    sample = read(value, "chat", tokenizer, **settings)
    assert isinstance(sample, Rendered)
    return sample


@pytest.mark.parametrize(
    "answer",
    [
        {"role": "assistant", "content": "yes", "thinking": "t"},
        {"from": "gpt", "value": "yes", "thinking": "t"},
        {"from": None, "value": None, "role": "assistant", "content": "yes", "thinking": "t"},
        {"from": "gpt", "value": "yes", "role": None, "content": None, "thinking": "t"},
        {"from": "gpt", "value": "yes", "role": "assistant", "content": "yes", "thinking": "t"},
        {"from": "gpt", "value": "yes", "role": "", "content": "", "thinking": "t"} | {"role": None},
        {"from": "a table", "value": None, "role": "assistant", "content": "yes", "thinking": "t"},
    ],
)
@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("as_text", [False, True])
def test_every_field_of_a_message_reaches_the_template(answer: dict[str, Any], name: str, as_text: bool) -> None:
    turns: Any = [GREETING, answer]
    sample = thinking({name: json.dumps(turns) if as_text else turns})
    assert marked(sample) == CHATML_TEXT.replace("⟦", "⟦<think>t</think>")


@pytest.mark.parametrize("other", [None, [], "", ()])
def test_an_empty_list_of_messages_gives_way_to_the_other_one(other: Any) -> None:
    assert chat({"messages": other, "conversations": [USER, ANSWER]}) == CHATML_TEXT
    assert chat({"messages": [USER, ANSWER], "conversations": other}) == CHATML_TEXT


def test_a_prompt_and_its_completion_may_be_messages() -> None:
    """As TRL has them: nothing of the prompt is learned."""
    turn = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    value = {"prompt": [USER, ANSWER, GREETING], "completion": [ANSWER, USER, ANSWER]}
    expected = f"{turn}yes<|im_end|>\n{turn}⟦yes<|im_end|>⟧\n{turn}⟦yes<|im_end|>⟧"
    assert chat(value) == expected
    assert chat(value | {"messages": [], "conversations": None}) == expected
    assert chat({"prompt": [], "completion": [USER, ANSWER]}) == CHATML_TEXT
    assert chat({"prompt": "of all messages", "messages": [USER, ANSWER]}) == CHATML_TEXT
    assert remarks(value) == []
    assert "every assistant turn is one that is not learned" in refusal(
        {"prompt": [USER, ANSWER], "completion": [USER]}, "chat", tokenizer_of(CHATML)
    )


def test_sharegpt_may_call_tools_as_openai_does() -> None:
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", TOOLS_TEMPLATE)
    texts = {
        marked(read({"conversations": [GREETING, turn]}, "chat", tokenizer))
        for turn in (
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "gpt", "value": None, "tool_calls": [CALL]},
            {"from": "gpt", "value": "", "tool_calls": json.dumps([{"function": CALL}])},
            {"from": "gpt", "tool_calls": [{"function": {"name": "add", "parameters": CALL["arguments"]}}]},
        )
    }
    (text,) = texts
    assert text.endswith('⟦<call>{"name": "add", "arguments": {"x": "日本", "n": [1]}}</call><|im_end|>⟧')


def test_the_id_of_a_call_without_function_is_kept() -> None:
    template = TOOLS_TEMPLATE.replace("'<call>' + ", "'<call>' + call.id + call.function | tojson + ")
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", template)
    calls = [{"id": "c1", "name": "add", "arguments": {}}, {"id": "c2", "function": {"name": "add", "arguments": "{}"}}]
    text = marked(read({"messages": [USER, {"role": "assistant", "tool_calls": calls}]}, "chat", tokenizer))
    assert 'c1{"name": "add", "arguments": {}}' in text and 'c2{"name": "add", "arguments": {}}' in text


@pytest.mark.parametrize("field", ["weight", "train", "training", "loss", "loss_scale"])
@pytest.mark.parametrize("answer", [ANSWER, {"from": "gpt", "value": "yes"}])
@pytest.mark.parametrize("no", [0, False, 0.0])
def test_turns_that_say_so_are_read_and_not_learned(field: str, answer: dict[str, Any], no: Any) -> None:
    """OpenAI's, Axolotl's and ms-swift's words for it; the template never sees them."""
    turns = [USER, answer | {field: no}, USER, answer | {field: 1}, USER, answer | {field: None}]
    turn = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    sample = read({"messages": turns}, "chat", tokenizer_of(CHATML))
    assert marked(sample) == f"{turn}yes<|im_end|>\n{turn}⟦yes<|im_end|>⟧\n{turn}⟦yes<|im_end|>⟧"
    assert chat({"messages": turns}, chat_targets="last") == f"{turn}yes<|im_end|>\n" * 2 + f"{turn}⟦yes<|im_end|>⟧"
    dumped = make_chat_tokenizer(CHATML.specials, "<|im_end|>", DUMP_TEMPLATE)
    whole = read({"messages": [USER, answer | {field: no}, answer | {field: True}]}, "chat", dumped)
    assert isinstance(whole, Rendered) and field not in whole.text


def remarks(value: dict[str, Any], dataset: str = "chat", tokenizer: Any = None, **settings: Any) -> list[Any]:
    sample = read(value, dataset, tokenizer or tokenizer_of(CHATML), **settings)
    assert sample is not None
    return list(sample.remarks)


def unread(*fields: str) -> list[tuple[str, str]]:
    return [("unread", field) for field in fields]


def test_what_nothing_reads_of_a_conversation() -> None:
    value = {"messages": [USER, ANSWER], "system": "s", "tools": [], "history": [], "id": None}
    assert remarks(value) == []
    assert remarks(value | {"id": 7, "history": [["a", "b"]], "conversations": [USER]}) == unread(
        "history", "id", "conversations"
    )
    named = {"messages": [USER | {"name": "u", "function_call": {"name": "add"}}, ANSWER | {"id": None}]}
    assert remarks(named) == unread("messages.name", "messages.function_call")
    parts = [
        {"type": "text", "text": "q", "image": None, "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": ""},
    ]
    assert remarks({"messages": [USER | {"content": parts}, ANSWER]}) == unread("messages.content.cache_control")
    assert remarks({"messages": [USER | {"train": True, "weight": 1}, ANSWER | {"train": True}]}) == unread(
        "messages.train of other turns than the assistant's"
    )


ROLES_IT_KNOWS = """\
{%- for m in messages %}{% if m.role in ('user', 'assistant') %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}
{%- elif m.role == 'tool' %}{{ {'output': m.content} | tojson + '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.mark.parametrize(
    ("messages", "lost"),
    [
        ([{"role": "system", "content": "be brief"}, USER, ANSWER], ["system"]),
        ([USER, {"role": "function", "content": "4"}, {"role": "developer", "content": "d."}, ANSWER], ["function", "developer"]),
        ([USER, {"role": "tool", "content": '{"a": "\\n"}'}, ANSWER], []),  # written as JSON
        ([USER, {"role": "system", "content": " "}, ANSWER, {"role": "system", "content": "behind what is learned"}], []),
        ([USER, ANSWER | {"content": "<think>t</think>yes", "weight": 0}, USER, ANSWER], []),
    ],
)  # fmt: skip
def test_messages_that_a_template_leaves_out_are_told(messages: list[dict[str, Any]], lost: list[str]) -> None:
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", ROLES_IT_KNOWS)
    found = remarks({"messages": messages}, tokenizer=tokenizer)
    assert found == unread(*(f"messages.content of the role {role}" for role in lost))


@pytest.mark.parametrize(
    ("template", "ignored"),
    [
        (DUMP_TEMPLATE, []),
        ("{% for m in messages %}{{ m.items() | list }}{% endfor %}", []),
        ("{% for m in messages %}{{ m['na' + 'me'] ~ m.content }}{% endfor %}", ["at"]),
        ("{% for m in messages %}{{ m.content }}{% if 'at' in m %}.{% endif %}{% endfor %}", ["name"]),
        ("{% for m in messages %}{% set function = {'name': 1} %}{{ function.name ~ m.content }}{% endfor %}", ["name", "at"]),
        ("{% for m in messages %}{{ m.content }}"
         "{% if m.role == 'user' and not m.name %}{{ 1 + '' }}{% endif %}{% endfor %}", ["at"]),
    ],
)  # fmt: skip
def test_what_a_template_reads_of_messages_is_seen_whatever_way_it_does(template: str, ignored: list[str]) -> None:
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", template + "<|im_end|>")
    value = {"messages": [message | {"name": "n", "at": "noon"} for message in (USER, ANSWER)]}
    assert remarks(value, tokenizer=tokenizer, chat_targets="last") == unread(*(f"messages.{name}" for name in ignored))


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]},
        {"role": "assistant", "tool_calls": [{"function": CALL | {"arguments": json.dumps(CALL["arguments"])}}]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"from": "function_call", "value": json.dumps(CALL)},
    ],
)
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_and_their_calls(turn: dict[str, Any], tools: Any) -> None:
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", TOOLS_TEMPLATE)
    sample = read({"messages": [USER, turn, RESULT, RESULT, ANSWER], "tools": tools}, "chat", tokenizer)
    assert marked(sample) == (
        f"<|im_start|>system\n{json.dumps(TOOL)}\n<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        '<|im_start|>assistant\n⟦<call>{"name": "add", "arguments": {"x": "日本", "n": [1]}}</call><|im_end|>⟧\n'
        "<|im_start|>user\n<result>3</result>\n<result>3</result><|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧"
    )


CALLS_OF_A_TEMPLATE = {
    "none beside a content": "{% if m.content %}{{ m.content }}{% else %}{{ m.tool_calls | tojson }}{% endif %}",
    "the first": "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}",
    "the last": "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[-1].function | tojson }}{% endif %}",
    "of another message": "{{ m.content }}{% if loop.first and m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}",
}


@pytest.mark.parametrize("which", CALLS_OF_A_TEMPLATE)
def test_a_call_that_the_template_does_not_write_is_refused(which: str) -> None:
    """Else the model would learn the content alone, or one call of several."""
    turn = f"{{{{ '<|im_start|>' + m.role + '\n' }}}}{CALLS_OF_A_TEMPLATE[which]}{{{{ '<|im_end|>' }}}}"
    start = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}{start}"
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", template)
    calls = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]}
    message = refusal({"messages": [USER, calls]}, "chat", tokenizer)
    assert message.startswith(
        "message 2: the chat template does not write all tool calls of this assistant turn as the "
    )
    whole = make_chat_tokenizer(CHATML.specials, "<|im_end|>", TOOLS_TEMPLATE)
    assert marked(read({"messages": [USER, calls]}, "chat", whole)).count("<call>") == 2


def test_a_call_without_a_generation_prompt() -> None:
    """The header is found although the turn has no content to look for."""
    template = TOOLS_TEMPLATE[: TOOLS_TEMPLATE.index("{%- if add_generation_prompt")]
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", template)
    calls = {"role": "assistant", "tool_calls": [CALL | {"arguments": ""}]}
    sample = read({"conversations": [USER, calls]}, "chat", tokenizer)
    assert marked(sample).endswith('<|im_start|>assistant\n⟦<call>{"name": "add", "arguments": {}}</call><|im_end|>⟧')


def test_a_template_that_wants_arguments_as_text_gets_them_so() -> None:
    """As DeepSeek's do, which add them to a string."""
    template = TOOLS_TEMPLATE.replace(
        "{'name': call.function.name, 'arguments': call.function.arguments} | tojson",
        "call.function.name + ' ' + call.function.arguments",
    )
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", template)
    calls = {"role": "assistant", "tool_calls": [CALL]}
    sample = read({"messages": [USER, calls, RESULT, ANSWER]}, "chat", tokenizer)
    assert '⟦<call>add {"x": "日本", "n": [1]}</call><|im_end|>⟧' in marked(sample)
    failing = make_chat_tokenizer(CHATML.specials, "<|im_end|>", "{{ messages[1].tool_calls + 1 }}")
    assert "TypeError: can only concatenate list" in refusal({"messages": [USER, calls]}, "chat", failing)


def test_several_answers_in_a_row_and_a_first_one() -> None:
    turn = "<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
    assert chat({"messages": [ANSWER, ANSWER, USER, ANSWER]}) == turn * 2 + CHATML_TEXT


def test_a_template_in_a_file_comes_before_the_tokenizers(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jinja", "\ufeff" + DEEPSEEK.template)
    tokenizer = tokenizer_of(LLAMA3)
    value = {"messages": [USER, ANSWER]}
    text = "<|begin_of_text|>User: q\n\nAssistant:⟦ yes<|end_of_text|>⟧"
    assert marked(read(value, "chat", tokenizer, chat_template=path)) == text
    bare = make_chat_tokenizer(LLAMA3.specials, LLAMA3.eos, None)
    assert marked(read(value, "chat", bare, chat_template=path)) == text


def test_named_templates() -> None:
    templates = {"rag": "no", "default": CHATML.template, "tool_use": TOOLS_TEMPLATE}
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", templates)
    value = {"messages": [USER, ANSWER]}
    assert marked(read(value, "chat", tokenizer)) == CHATML_TEXT
    with_tools = marked(read(value | {"tools": [TOOL]}, "chat", tokenizer))
    assert with_tools == f"<|im_start|>system\n{json.dumps(TOOL)}\n<|im_end|>\n{CHATML_TEXT}"
    del templates["default"]
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", templates)
    assert "has chat templates of the names rag, tool_use, none is 'default', so" in refused_format("chat", tokenizer)


def test_a_template_that_writes_the_date_writes_the_same_one_every_day() -> None:
    template = "{{ strftime_now('%d %b %Y, %A %d %B %y, %m %H:%M:%S') + '\n' }}" + CHATML.template
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", template)
    text = marked(read({"messages": [USER, ANSWER]}, "chat", tokenizer))
    assert text == f"26 Jul 2024, Friday 26 July 24, 07 00:00:00\n{CHATML_TEXT}"
    indented = "  {% if true %}\n" + template + "{% endif %}"
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", indented)
    assert marked(read({"messages": [USER, ANSWER]}, "chat", tokenizer)) == text


def test_an_end_token_that_is_added_and_not_special_ends_a_turn() -> None:
    tokenizer = make_chat_tokenizer(("</s>",), "</s>", CHATML.template)
    assert not read({"messages": [USER, ANSWER]}, "chat", tokenizer).ends_itself
    tokenizer.add_tokens(["<|im_end|>"])
    sample = read({"messages": [USER, ANSWER]}, "chat", tokenizer)
    assert (marked(sample), sample.ends_itself) == (CHATML_TEXT, True)


CHECKED = [USER, ANSWER]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"chat": CHECKED}, "the record has no field 'messages' or 'conversations' (it has 'chat'). Add it, or set "),
        ({"messages": "a"}, "the record has 'messages' that is not JSON (Expecting value: 'a'). Fix or remove the record."),
        ({"messages": "1"}, "'messages' is a number, not an array of messages. Fix or remove the record."),
        ({"messages": []}, "the conversation has no assistant turn, so the record has no target token. Add one or remove "),
        ({"messages": [USER]}, "the conversation has no assistant turn, so the record has no target token."),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "every assistant turn is one that is not learned, by its "
         "weight, train, training, loss, loss_scale or as part of a prompt, so the record has no target token."),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "message 2 has the weight 0.5; it must be 0 (not learned) or 1."),
        ({"messages": ["a"]}, "message 1 is a string, not an object with 'role' and 'content'. Fix or remove the record."),
        ({"messages": [{"content": "a"}]}, "message 1 has no field 'role' (it has 'content'). Fix or remove the record."),
        ({"messages": [USER | {"role": "usr"}]}, "message 1 has the role 'usr', which is none of system, developer, user, "
         "assistant, tool, function, ipython."),
        ({"messages": [USER | {"role": ["user"]}]}, "message 1 has the role ['user'], which is none of system, "),
        ({"conversations": [{"from": "alien", "value": ""}]}, "message 1 is from 'alien', which is none of system, human, "),
        ({"conversations": [{"from": "gpt"}]}, "message 1 has no field 'value' (it has 'from'); it must be a string."),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "message 1 has as 'value' a number; it must be a string."),
        ({"messages": [{"role": "user"}]}, "message 1 has no field 'content' (it has 'role'); only a message with "
         "tool_calls may go without."),
        ({"messages": [USER | {"content": None}]}, "message 1 has null as 'content'; only a message with tool_calls may "),
        ({"messages": [USER | {"content": 1}]}, "message 1 has a number as 'content', not a string or an array of text "),
        ({"messages": [USER | {"content": [{"type": "image_url"}]}]}, "message 1 has a content part of the type "
         "'image_url'; only parts {'type': 'text', 'text': ...} can be read."),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, "message 1 has a content part without text; only parts "),
        ({"messages": [USER | {"content": ["a"]}]}, "message 1 has a content part without text; only parts "),
        ({"messages": [USER, ANSWER | {"content": " \n"}]}, "message 2 is an assistant turn without content or tool calls, "
         "so nothing of it can be learned. Fill it in or remove the record."),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [1]}]}, "message 2 has a tool call that is no object with "),
        ({"messages": [USER, {"role": "assistant", "tool_calls": CALL}]}, "message 2 has an object as 'tool_calls', not an "),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL | {"arguments": "{x"}]}]}, "message 2 has "
         "'arguments' of a tool call that is not JSON (Expecting property name enclosed in double quotes: '{x')."),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL | {"arguments": "[" * 10**5}]}]}, "message 2 has "
         "'arguments' of a tool call that is not JSON (RecursionError: '[[["),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL | {"arguments": "[]"}]}]}, "message 2 has a tool "
         "call whose 'arguments' are an array, not an object."),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "message 1 has 'value' of a function_call that "
         "is not JSON (Expecting value: 'add(1)')."),
        ({"messages": [USER, ANSWER | {"weight": "0"}]}, "message 2 has the weight '0'; it must be 0 (not learned) or 1. "),
        ({"messages": [USER, ANSWER | {"loss_scale": 2}]}, "message 2 has the loss_scale 2; it must be 0 (not learned) or 1. "
         "Turns cannot count for more or less than others. Fix or remove the record."),
        ({"messages": [GREETING, {"from": "gpt", "value": "yes", "train": "no"}]}, "message 2 has the train 'no'; it must "),
        ({"messages": [USER, ANSWER | {"train_detail": [{"begin_offset": 0}]}]}, "message 2 has 'train_detail', but a turn is "
         "learned as a whole or not at all. Set 'train' of the turn, and leave 'train_detail' out."),
        ({"messages": [GREETING | {"role": "assistant"}]}, "message 1 has 'from' and 'value', and something else as 'role'. "),
        ({"messages": [GREETING | {"content": "p"}]}, "message 1 has 'from' and 'value', and something else as 'content'. "),
        ({"messages": [{"from": "function_call", "value": json.dumps(CALL), "tool_calls": [CALL]}]}, "message 1 has 'from' "
         "and 'value', and something else as 'tool_calls'. Keep one of them."),
        ({"conversations": [GREETING, {"from": "gpt", "value": "yes", "thinking": "t"}]}, "message 2: the chat template does "
         "not write the thinking of this assistant turn as the record has it, so it would not be learned."),
        ({"conversations": '["a"]'}, "message 1 is a string, not an object with 'role' and 'content'. "),
        ({"messages": CHECKED, "tools": {}}, "the record has an object as 'tools', not an array."),
        ({"messages": CHECKED, "tools": "[1]"}, "the record has a number in 'tools', not only objects that describe a tool."),
        ({"messages": CHECKED, "tools": "add"}, "the record has 'tools' that is not JSON (Expecting value: 'add')."),
        ({"messages": CHECKED, "system": 1}, "'system' is a number, not a string."),
        ({"messages": [{"role": "system", "content": ""}, *CHECKED], "system": "s"}, "the record has 'system' and begins "
         "with a system message too. Keep one of them."),
        ({"messages": CHECKED, "tools": [TOOL]}, "the record has 'tools', but the chat template does not write them. Pass "
         "--chat_template with a Jinja file that does, or remove the record."),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, "the record has 'tool_calls', but the chat "),
        ({"messages": [USER, ANSWER | {"name": 1, "content": "a\ud83d"}], "system": "s"},
         "'content' of message 2 has half a UTF-16 pair at character 2, which is no text. Fix or remove the record."),
    ],
)  # fmt: skip
def test_refuses_with_file_and_line(value: dict[str, Any], message: str) -> None:
    assert refusal(value, "chat", tokenizer_of(CHATML)).startswith(message)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.alternates], ids=lambda family: family.name)
def test_what_a_template_itself_refuses_is_told_in_its_words(family: Any) -> None:
    message = refusal({"messages": [USER, USER, ANSWER]}, "chat", tokenizer_of(family))
    assert message == (
        "the chat template refuses the conversation (Roles must alternate: user, assistant, user, ...). Fix or remove the "
        "record, or pass --chat_template with a Jinja file that takes it."
    )


def test_gemma_has_no_system_turn() -> None:
    message = refusal({"messages": [USER, ANSWER], "system": "s"}, "chat", tokenizer_of(GEMMA))
    assert message.startswith("the chat template refuses the conversation (There is no system role).")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'] + 1 }}", 'TypeError: can only concatenate str (not "int") to str'),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ messages.__class__.__base__ }}", "access to attribute '__class__' of 'list' object is unsafe."),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
    ],
)
def test_a_template_that_fails_says_why(template: str, reason: str) -> None:
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", template)
    message = refusal({"messages": [USER, ANSWER]}, "chat", tokenizer)
    assert message.startswith(f"the chat template refuses the conversation ({reason}")


def test_refuses_a_template_that_is_missing_or_none(tmp_path: Path) -> None:
    bare = make_chat_tokenizer(CHATML.specials, "<|im_end|>", None)
    assert refused_format("chat", bare).endswith(
        ": has no chat template, so conversations cannot be written as text. Pass --chat_template with the path of a Jinja "
        "file, or set --tokenizer_name to the tokenizer of a chat model."
    )
    path = write(tmp_path / "t.jinja", "a\n{% for x %}")
    assert refused_format("chat", bare, chat_template=path) == (
        f"{path}:2: not a Jinja template (expected token 'in', got 'end of statement block'). Fix the template."
    )
    assert refused_format("chat", bare, chat_template=str(tmp_path / "none")) == (
        f"{tmp_path / 'none'}: the chat template cannot be read (No such file or directory). Check --chat_template."
    )


def test_fingerprints_tell_templates_and_targets_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jinja", CHATML.template + " ")
    same = write(tmp_path / "same.jinja", CHATML.template)
    tokenizer = tokenizer_of(CHATML)
    fingerprints = [
        fingerprint("chat", tokenizer),
        fingerprint("chat", tokenizer, chat_targets="last"),
        fingerprint("chat", tokenizer, chat_template=path),
        fingerprint("chat", tokenizer_of(MISTRAL_3)),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert fingerprint("chat", tokenizer, chat_template=same) == fingerprints[0]
