"""Learned ranges in the text of any renderer: also of ones that no family has, and without measuring each turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.formats import turns
from ds_recipes.data.formats.turns import Whole
from ds_recipes.errors import InputError

ENDS = ("<tail>", "<eos>", "<end>")
AROUND = st.sampled_from(["", " ", "\n", "\n\n", "#", "# ", "[x] ", "a", "a ", "[y]\n"])
BEHIND = st.sampled_from(["", " ", "\n", "<eos>", "<end>\n", " <eos>", ".", ".\n"])
CONTENTS = st.lists(st.sampled_from(["a", "b", " ", "\n", "#", ".", "<eos>"]), max_size=4).map("".join)
SPACES = st.sampled_from(["", " ", "\n", "\n\n", " \n"])
SPACED_CONTENTS = st.sampled_from(["a", "a ", " a", "a\n", "\na", "\na\n"])


@dataclass(frozen=True)
class Grammar:
    """A renderer made of what stands before and behind the contents of each role."""

    before: dict[str, str]
    behind: dict[str, str]
    trims: bool
    prompts: bool
    tail: str

    def __call__(self, messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        text = "<bos>"
        for message in messages:
            role, content = message["role"], message["content"]
            text += self.before[role] + (content.strip() if self.trims else content) + self.behind[role]
        return text + (
            self.before["assistant"] if self.prompts and generation_prompt else "" if self.prompts else self.tail
        )


def grammars(before: st.SearchStrategy[str], behind: st.SearchStrategy[str]) -> st.SearchStrategy[Grammar]:
    return st.builds(
        Grammar,
        st.fixed_dictionaries({"user": before, "assistant": before}),
        st.fixed_dictionaries({"user": behind, "assistant": behind}),
        st.booleans(),
        st.booleans(),
        st.sampled_from(["", "<tail>"]),
    )


def conversations(contents: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Ending with an assistant turn; every such turn has content."""
    message = st.builds(
        lambda role, content: {
            "role": role,
            "content": content if role == "user" or content.strip() else content + "a",
        },
        st.sampled_from(["user", "assistant"]),
        contents,
    )
    return st.lists(message, min_size=1, max_size=12).map(lambda m: [*m, {"role": "assistant", "content": "b"}])


def ranges(render: Any, messages: Sequence[dict[str, Any]], few_turns: int) -> list[tuple[int, int]] | str:
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    with mock.patch.object(turns, "FEW_TURNS", few_turns):
        try:
            return Whole(render, messages, ENDS, "a.jsonl:1").ranges(assistant)
        except InputError as error:
            return str(error)


@settings(deadline=None, max_examples=400)
@given(grammars(AROUND, BEHIND), conversations(CONTENTS))
def test_turns_between_the_same_texts_need_no_measuring(render: Grammar, messages: Sequence[dict[str, Any]]) -> None:
    assert ranges(render, messages, 0) == ranges(render, messages, 100)


@settings(deadline=None, max_examples=400)
@given(grammars(SPACES, SPACES), conversations(SPACED_CONTENTS))
def test_nor_where_only_white_space_tells_them_apart(render: Grammar, messages: Sequence[dict[str, Any]]) -> None:
    assert ranges(render, messages, 0) == ranges(render, messages, 100)


def break_by_role(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
    """Between two messages stands a line break: behind an assistant's, or before the answer to a user."""
    text = ""
    for i, message in enumerate(messages):
        text += "\n" * (i > 0 and message["role"] == "assistant" and messages[i - 1]["role"] == "user")
        text += message["content"] + "\n" * (message["role"] == "assistant")
    return text


def numbered_headers(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
    text = "".join(f"[{str(i) * (i % 2)}{m['role']}]{m['content']}<end>" for i, m in enumerate(messages))
    return text + "[" * generation_prompt


def numbered_ends(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
    return (
        "".join(f"[{m['role']}]{m['content']}{f'({i})' * (i % 2)}<end>" for i, m in enumerate(messages))
        + "[assistant]" * generation_prompt
    )


def bare(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
    return "".join(m["content"] for m in messages)


def shout_if_first(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
    """Writes what begins with an `a` in another way: marked contents do not begin so."""
    written = ["!" * m["content"].startswith("a") + m["content"] for m in messages]
    text = "".join(f"[{m['role']}]{text}<end>" for m, text in zip(messages, written, strict=True))
    return text + "[assistant]" * generation_prompt


def drop_thoughts(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
    return (
        "".join(f"[{m['role']}]{m['content'].split('#')[-1]}<end>" for m in messages)
        + "[assistant]" * generation_prompt
    )


def keep_last_thought(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
    texts = [m["content"] for m in messages]
    texts[-1] = messages[-1].get("thought", "") + texts[-1]
    text = "".join(f"[{m['role']}]{text}<end>" for m, text in zip(messages, texts, strict=True))
    return text + "[assistant]" * generation_prompt


MANY = [{"role": ("user", "assistant")[i % 2], "content": "ab"[i % 2]} for i in range(30)]
IN_A_ROW = [MANY[1] if i % 3 == 1 else m for i, m in enumerate(MANY)]
FOR_ALL = [m | {"content": ("a", "b", "x#b", "a")[i % 4]} for i, m in enumerate(MANY)]
SPACED = [m | {"content": ("a", "b\n", "a", "b", "\na", "b\n")[i % 6]} for i, m in enumerate(MANY)]
THINKING = [m | {"thought": "t"} if i == 13 else m for i, m in enumerate(MANY)]


@pytest.mark.parametrize(
    "render", [bare, break_by_role, numbered_headers, numbered_ends, shout_if_first, drop_thoughts, keep_last_thought]
)
@pytest.mark.parametrize("messages", [MANY, IN_A_ROW, FOR_ALL, SPACED, THINKING])
def test_nor_where_a_template_looks_at_more_than_one_message(render: Any, messages: Sequence[dict[str, Any]]) -> None:
    assert ranges(render, messages, 0) == ranges(render, messages, 100)


@settings(deadline=None, max_examples=300)
@given(
    grammars(AROUND, BEHIND).filter(lambda grammar: grammar.prompts and grammar.before["assistant"].strip()),
    conversations(CONTENTS),
)
def test_a_range_begins_behind_the_generation_prompt_and_ends_with_its_turn(
    render: Grammar, messages: Sequence[dict[str, Any]]
) -> None:
    """A first message has no prompt: there, spaces of the header count as the answer's."""
    wanted = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start, stop = len(render(messages[:i], True)), len(render(messages[: i + 1], False))
            text = render(messages, False)[start:stop]
            ended = text.rstrip().endswith(ENDS)
            lead = len(render.before["assistant"]) - len(render.before["assistant"].rstrip(" ")) if i == 0 else 0
            wanted.append((start - lead, start + len(text.rstrip()) if ended else stop))
    found = ranges(render, messages, 2)
    if isinstance(found, str):  # an answer of nothing but an end token's text, trimmed down to it
        assert "does not write anything of this assistant turn" in found
    else:
        assert found == wanted


def test_a_header_of_white_space_alone_is_written_by_the_model() -> None:
    render = Grammar({"user": "[x] ", "assistant": "\n"}, {"user": " [y]", "assistant": "<eos>"}, True, False, "")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": []}]
    text = render(messages, False).replace("\n<eos>", "\ncall<eos>")

    def calling(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        return render(messages, generation_prompt).replace("\n<eos>", "\ncall<eos>")

    assert Whole(calling, messages, ENDS, "a").ranges([1]) == [(len("<bos>[x] a [y]"), len(text))]


def test_what_only_a_last_message_has_behind_it_is_not_part_of_earlier_turns() -> None:
    render = Grammar({"user": "[u]", "assistant": "[a]"}, {"user": "", "assistant": "<end>\n"}, False, False, "<eos>")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    whole = Whole(render, messages, ENDS, "a")
    assert [whole.text[slice(*each)] for each in whole.ranges([1, 3])] == ["b<end>", "b<end>\n<eos>"]


def test_marks_in_contents_are_contents() -> None:
    render = Grammar({"user": "[u]", "assistant": "[a]"}, {"user": "", "assistant": "<eos>"}, True, True, "")
    messages = [
        {"role": "user", "content": f"x{turns.OPEN}y{turns.CLOSE}"},
        {"role": "assistant", "content": f"{turns.CLOSE}b"},
    ] * 4
    assert ranges(render, messages, 2) == ranges(render, messages, 100)


def refusal(render: Any, messages: Sequence[dict[str, Any]], turn: int) -> str:
    with pytest.raises(InputError) as caught:
        Whole(render, messages, ENDS, "a.jsonl:3").ranges([turn])
    return str(caught.value)


MESSAGES_OF_TWO = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]


def test_refuses_a_generation_prompt_that_the_turn_does_not_begin_with() -> None:
    def render(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]<think>\n" * generation_prompt

    assert refusal(render, MESSAGES_OF_TWO, 1) == (
        "a.jsonl:3: message 2: the chat template's generation prompt goes on with '<think>\\n', but the turn does not, so "
        "the model would learn another beginning than it is given at inference. Pass --chat_template with a Jinja file in "
        "which the two agree."
    )


def test_refuses_a_turn_that_is_written_otherwise_later() -> None:
    def render(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        return "".join(f"{len(messages)}{m['content']}" for m in messages)

    assert refusal(render, MESSAGES_OF_TWO * 2, 1).startswith(
        "a.jsonl:3: message 2: the chat template writes this turn, or what comes before it, in another way once later "
        "messages follow, as templates do that drop earlier thinking. So it cannot be learned as it was written. Pass "
        "--chat_targets last "
    )


@pytest.mark.parametrize(
    ("turn", "written", "lost"),
    [
        ({"content": "yes"}, "", "anything"),
        ({"content": "yes"}, "<eos>", "anything"),
        ({"content": ""}, " <eos>\n", "anything"),
        ({"content": "yes"}, "no<eos>", "the content"),
        ({"content": " yes<eos>\n"}, "yes<eos>", ""),
        ({"content": "<think>\nt\n</think>\n\nyes"}, "yes<eos>", "the thinking"),
        ({"content": "<think>\nt\n</think>\n\nyes"}, "<think> t </think> yes<eos>", ""),
        ({"content": "t</think>yes"}, "<think> t </think> yes<eos>", ""),
        ({"content": "<think></think>yes"}, "yes<eos>", ""),
        ({"content": "yes", "reasoning_content": "t"}, "yes<eos>", "the thinking"),
        ({"content": "yes", "reasoning_content": " t\n"}, "t yes<eos>", ""),
        ({"content": "yes", "thinking": "t"}, "yes<eos>", "the thinking"),
    ],
)
def test_refuses_a_turn_of_which_something_is_lost(turn: dict[str, Any], written: str, lost: str) -> None:
    def render(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        texts = [m["content"] if m["role"] == "user" else "[a]" + written for m in messages]
        return "".join(texts) + "[a]" * generation_prompt

    messages = [{"role": "user", "content": "q"}, {"role": "assistant"} | turn]
    if lost:
        assert refusal(render, messages, 1) == (
            f"a.jsonl:3: message 2: the chat template does not write {lost} of this assistant turn as the record has it, so "
            "it would not be learned. Pass --chat_template with a Jinja file that does, or change or remove the record."
        )
    else:
        whole = Whole(render, messages, ENDS, "a.jsonl:3")
        assert whole.text[slice(*whole.ranges([1])[0])] == written


def test_says_that_line_breaks_of_a_file_are_text() -> None:
    def render(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]\n" * generation_prompt

    message = refusal(render, MESSAGES_OF_TWO, 1)
    assert (
        "goes on with '\\n' (in a template, line breaks and indents are text too, unless {%- and -%} take " in message
    )
