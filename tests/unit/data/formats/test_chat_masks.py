"""The learned characters and tokens of conversations are those of a plain oracle, for each family of templates."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.encode import Encoder
from ds_recipes.data.formats.chat import ChatFormat
from ds_recipes.data.formats.sample import Rendered
from ds_recipes.data.sources.record import Record
from ds_recipes.errors import InputError
from tests.unit.data.formats.families import (
    CHATML,
    CHATML_WITH_TAGS,
    DEEPSEEK,
    FAMILIES,
    HEADINGS,
    MISTRAL,
    PHI3,
    THINKING,
    Family,
    Messages,
    make_chat_tokenizer,
    tokenizer_of,
)

PIECES = [
    "a",
    "yes",
    " ",
    "  ",
    "\n",
    "日本",
    "🙂",
    "é",
    "#",
    "{{ x }}",
    "[INST]",
    "</s>",
    "<|im_end|>",
    "<think>",
    "user",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn, family: Family) -> Messages:
    """Messages that the family's template takes, with at least one assistant turn that is learned."""
    turns = draw(st.integers(1, 6))
    if family.alternates:
        roles = ["user", "assistant"] * turns + draw(st.sampled_from([[], ["user"]]))
    else:
        roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=2 * turns))
        roles.insert(draw(st.integers(0, len(roles))), "assistant")
    if family.has_system and draw(st.booleans()):
        roles = ["system", *roles]
    messages: Messages = []
    for role in roles:
        content = draw(TEXTS)
        if role == "assistant" and (not content.strip() or family is HEADINGS):
            content += "yes"  # not empty; and without an end token, one that a text ends with would be taken for it
        messages.append({"role": role, "content": content})
    assistant = [message for message in messages if message["role"] == "assistant"]
    for message in assistant[1:]:
        message |= draw(st.sampled_from([{}, {}, {"weight": 0}, {"weight": 1}, {"weight": None}]))
    return messages


def read(family: Family, value: dict[str, Any], targets: str = "all") -> Rendered:
    return ChatFormat(tokenizer_of(family), None, targets).read(Record("a.jsonl", 1, 0, value))


def expected(family: Family, messages: Messages, targets: str) -> tuple[str, list[bool]]:
    """The text up to its last learned character, and whether each character is learned: by writing it out plainly."""
    learned = [m.get("weight") != 0 for m in messages if m["role"] == "assistant"]
    if targets == "last":
        last = max(i for i, is_learned in enumerate(learned) if is_learned)
        learned = [i == last for i in range(len(learned))]
    end = [i for i, m in enumerate(messages) if m["role"] == "assistant"][max(np.flatnonzero(learned))]
    text, mask, turn, was = "", [], -1, False
    for piece, is_assistant in family.write(messages[: end + 1]):
        turn += is_assistant and not was
        was = is_assistant
        text += piece
        mask += [is_assistant and learned[turn]] * len(piece)
    stop = max(np.flatnonzero(mask)) + 1
    return text[:stop], mask[:stop]


def mask_of(sample: Rendered) -> list[bool]:
    mask = [False] * len(sample.text)
    for start, stop in sample.targets:
        mask[start:stop] = [True] * (stop - start)
    return mask


@pytest.mark.parametrize("targets", ["all", "last"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_learned_characters_are_the_answers_and_their_end_tokens(
    family: Family, targets: str, data: st.DataObject
) -> None:
    messages = data.draw(conversations(family))
    sample = read(family, {"messages": messages}, targets)
    text, mask = expected(family, messages, targets)
    assert sample.text == text
    assert mask_of(sample) == mask
    assert sample.ends_itself == (family is not HEADINGS)


@pytest.mark.parametrize("trims_offsets", [False, True])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_learned_tokens_are_those_within_the_learned_characters(
    family: Family, trims_offsets: bool, data: st.DataObject
) -> None:
    messages = data.draw(conversations(family))
    sample = read(family, {"messages": messages})
    encoder = Encoder.of(tokenizer_of(family, trims_offsets=trims_offsets), 500)
    encoded = encoder.encode([Record("a.jsonl", 1, 0, {})], [sample])
    joint = tokenizer_of(family)(sample.text, add_special_tokens=False, return_offsets_mapping=True)
    mask = mask_of(sample)
    is_learned = [all(mask[start:stop]) for start, stop in joint.offset_mapping]
    eos = [] if sample.ends_itself else [tokenizer_of(family).eos_token_id]
    assert encoded.ids.tolist() == joint.input_ids + eos
    by_spans = [False] * len(encoded.ids)
    for start, stop in encoded.spans:
        by_spans[start:stop] = [True] * int(stop - start)
    assert by_spans == [False, *is_learned[1:]] + [True] * len(eos)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_decoded_learned_tokens_are_the_answers(family: Family) -> None:
    """By search: contents that occur once are found in the text, and what is learned is one of them and its end."""
    tokenizer = tokenizer_of(family)
    answers = ["answer one 日本語", "answer two\nof two lines"]
    messages = [
        {"role": "user", "content": "question one"},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "question two"},
        {"role": "assistant", "content": answers[1]},
    ]
    encoded = Encoder.of(tokenizer, 500).encode([Record("a", 1, 0, {})], [read(family, {"messages": messages})])
    ids = encoded.ids.tolist()
    decoded = [tokenizer.decode(ids[start:stop]) for start, stop in encoded.spans]
    assert len(decoded) == 2
    for text, answer in zip(decoded, answers, strict=True):
        before, behind = text.split(answer)
        assert before.strip() == ""
        assert (
            behind.strip() == "" if family is HEADINGS and text is decoded[0] else behind.strip() in ENDS[family.name]
        )
    everything = tokenizer.decode(ids)
    assert all(everything.count(answer) == 1 for answer in answers)
    assert everything.count("question one") == 1


ENDS = {family.name: (family.specials[-1], family.eos) for family in FAMILIES} | {
    "chatml": ("<|im_end|>",),
    "chatml without a generation prompt": ("<|im_end|>",),
    "chatml with generation tags": ("<|im_end|>",),
    "llama 3": ("<|eot_id|>",),
    "llama 3 without a generation prompt": ("<|eot_id|>",),
    "mistral 0.3": ("</s>",),
    "gemma": ("<end_of_turn>",),
    "phi 3": ("<|end|>", "<|end|>\n<|endoftext|>"),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_tokens_before_the_first_answer_are_those_of_the_prompt_at_inference(
    family: Family, data: st.DataObject
) -> None:
    """Also where tokens join any neighbours, so that the border lies within a token of the whole text."""
    joining = make_chat_tokenizer(
        family.specials,
        family.eos,
        family.template,
        splits_words=False,
        words="User: a\n\nAssistant: yes and no [/INST] yes",
    )
    messages = data.draw(conversations(family))
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if first == 0:
        return
    sample = ChatFormat(joining, None, "all").read(Record("a.jsonl", 1, 0, {"messages": messages}))
    encoded = Encoder.of(joining, 500).encode([Record("a.jsonl", 1, 0, {})], [sample])
    start, (learned_start, _) = int(encoded.spans[0, 0]), sample.targets[0]
    prompt = joining(sample.text[:learned_start], add_special_tokens=False).input_ids
    assert encoded.ids[:start].tolist() == prompt
    if "add_generation_prompt" in family.template:
        at_inference = joining.apply_chat_template(messages[:first], add_generation_prompt=True, return_dict=False)
        assert encoded.ids[:start].tolist() == at_inference
    eos = [] if sample.ends_itself else [joining.eos_token_id]
    assert joining.decode(encoded.ids) == sample.text + joining.decode(eos)


def test_a_border_within_a_token_cuts_the_text_there() -> None:
    joining = make_chat_tokenizer(
        DEEPSEEK.specials, DEEPSEEK.eos, DEEPSEEK.template, splits_words=False, words="Assistant: yes"
    )
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yes"}]
    sample = ChatFormat(joining, None, "all").read(Record("a.jsonl", 1, 0, {"messages": messages * 2}))
    (start, stop), (next_start, _) = sample.targets
    whole = joining.tokenize(sample.text)
    assert "Assistant:Ġyes" in whole
    encoded = Encoder.of(joining, 500).encode([Record("a.jsonl", 1, 0, {})], [sample])
    pieces = [sample.text[:start], sample.text[start:next_start], sample.text[next_start:]]
    ids = [joining(piece, add_special_tokens=False).input_ids for piece in pieces]
    assert encoded.ids.tolist() == ids[0] + ids[1] + ids[2]
    learned = [joining.decode(encoded.ids[a:b]) for a, b in encoded.spans]
    assert learned == [sample.text[start:stop], sample.text[next_start:]]


@settings(deadline=None, max_examples=40)
@given(conversations(CHATML_WITH_TAGS))
def test_equals_the_mask_of_a_template_with_generation_tags(messages: Messages) -> None:
    tokenizer = tokenizer_of(CHATML_WITH_TAGS)
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    encoded = Encoder.of(tokenizer, 500).encode(
        [Record("a.jsonl", 1, 0, {})], [read(CHATML_WITH_TAGS, {"messages": messages})]
    )
    ids, mask = theirs["input_ids"], theirs["assistant_masks"]
    last = max(np.flatnonzero(mask))
    assert encoded.ids.tolist() == ids[: last + 1]
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).reshape(-1, 2)
    assert encoded.spans.tolist() == edges.tolist()


@pytest.mark.parametrize("family", [CHATML, MISTRAL, PHI3, HEADINGS], ids=lambda family: family.name)
def test_the_end_of_a_turn_is_learned_where_the_padding_token_is_eos(family: Family) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]
    sample = read(family, {"messages": messages})
    encoded = [
        Encoder.of(tokenizer_of(family, pad_is_eos), 500).encode([Record("a", 1, 0, {})], [sample])
        for pad_is_eos in (True, False)
    ]
    assert tokenizer_of(family, True).pad_token_id == tokenizer_of(family, True).eos_token_id
    assert encoded[0].ids.tolist() == encoded[1].ids.tolist()
    assert encoded[0].spans.tolist() == encoded[1].spans.tolist()
    assert encoded[0].spans[-1, 1] == len(encoded[0].ids)


def test_long_conversations_are_rendered_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(CHATML)
    rendered, original = [], tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *args, **more: rendered.append(1) or original(*args, **more)
    )
    messages = [
        message
        for i in range(100)
        for message in ({"role": "user", "content": f"q{i} "}, {"role": "assistant", "content": f" a{i}\n"})
    ]
    chat = ChatFormat(tokenizer, None, "all")
    rendered.clear()
    sample = chat.read(Record("a.jsonl", 1, 0, {"messages": messages}))
    assert len(rendered) <= 8
    assert (sample.text, mask_of(sample)) == expected(CHATML, messages, "all")


def test_a_template_that_drops_thinking_learns_the_last_turn_with_its_thinking() -> None:
    tokenizer = make_chat_tokenizer(CHATML.specials, "<|im_end|>", THINKING)
    messages = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "<think>t1</think>\n\na1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "<think>t2</think>\n\na2"},
    ]
    record = Record("a.jsonl", 4, 3, {"messages": messages})
    sample = ChatFormat(tokenizer, None, "last").read(record)
    assert sample.text.startswith("<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n")
    ((start, stop),) = sample.targets
    assert sample.text[start:stop] == "<think>\nt2\n</think>\n\na2<|im_end|>"
    one_turn = ChatFormat(tokenizer, None, "all").read(Record("a.jsonl", 4, 3, {"messages": messages[:2]}))
    assert one_turn.text[slice(*one_turn.targets[0])] == "<think>\nt1\n</think>\n\na1<|im_end|>"
    with pytest.raises(InputError, match=r"^a\.jsonl:4: message 2: the chat template writes .* --chat_targets last "):
        ChatFormat(tokenizer, None, "all").read(record)


@pytest.mark.parametrize("generation_prompt", ["Assistant:", "Assistant:<think>\\n"])
def test_a_template_that_drops_all_thinking_learns_answers_without_it(generation_prompt: str) -> None:
    """As DeepSeek-R1's does; a later version of it begins the thinking in the generation prompt."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User:' + m['content'] }}{% else %}"
        "{{ 'Assistant:' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + generation_prompt + "' }}{% endif %}"
    )
    chat = ChatFormat(make_chat_tokenizer(DEEPSEEK.specials, DEEPSEEK.eos, template), None, "last")
    messages = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "<think>t</think>a1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    ]
    if "think" in generation_prompt:
        with pytest.raises(InputError, match=r"message 4: the chat template's generation prompt goes on with '<think>"):
            chat.read(Record("a.jsonl", 1, 0, {"messages": messages}))
        return
    sample = chat.read(Record("a.jsonl", 1, 0, {"messages": messages}))
    assert (
        sample.text
        == "<｜begin▁of▁sentence｜>User:q1Assistant:a1<｜end▁of▁sentence｜>User:q2Assistant:a2<｜end▁of▁sentence｜>"
    )
    assert [sample.text[slice(*each)] for each in sample.targets] == ["a2<｜end▁of▁sentence｜>"]
    with pytest.raises(
        InputError, match="message 2: the chat template does not write the thinking of this assistant turn"
    ):
        chat.read(Record("a.jsonl", 1, 0, {"messages": messages[:2]}))
