"""Which characters of a rendered conversation are learned, found by rendering its beginnings.

At inference a model is given what the template writes for the messages before its turn and the generation prompt, and
goes on from there. So what is learned of a turn begins where that prompt ends and reaches to where the text of the
messages up to the turn ends. Both must be beginnings of the whole text: then nothing is needed in the template, and
training sees what inference sees.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ds_recipes.data.formats.conversation import Message
from ds_recipes.errors import InputError

Render = Callable[[Sequence[Message], bool], str]
"""What the chat template writes for messages, with the generation prompt (True) or without it."""

Range = tuple[int, int]

FEW_TURNS = 2
"""So many turns are each measured. Of more, a turn that stands between the same texts as a measured one is not."""

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Unicode noncharacters, which no text has: contents are put between them to find where they are written."""

SHOWN_CHARACTERS = 40
PLAIN_FIELDS = {"role", "content"}
THINKING, END_OF_THINKING = "<think>", "</think>"
THINKING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Where transformers looks for the thinking of a message; most templates know the first."""


@dataclass(frozen=True)
class Whole:
    """A conversation that ends with its last learned turn, and its text.

    `ends`: the texts of tokens that can end a turn. `place` begins every error; `first_number` is the first message's.
    """

    render: Render
    messages: Sequence[Message]
    ends: tuple[str, ...]
    place: str
    first_number: int = 1

    @cached_property
    def text(self) -> str:
        return self.render(self.messages, False)

    def ranges(self, turns: Sequence[int]) -> list[Range]:
        """The learned characters [start, stop) of each turn; white space behind a turn's end token is not learned.

        Raises:
            InputError: a turn is written otherwise once later ones follow, or not as the record has it, or does not
                begin as the generation prompt has it.
        """
        places = self._places() if len(turns) > FEW_TURNS else {}
        measured: dict[tuple[str, ...], Range] = {}
        ranges = []
        for turn in turns:
            key = self._between(turn, places)
            if key is None:
                start, stop = self._measure(turn)
            else:
                content_start, content_stop = places[turn]
                if key not in measured:
                    start, stop = self._measure(turn)
                    measured[key] = start - content_start, stop - content_stop
                before, behind = measured[key]
                start, stop = content_start + before, content_stop + behind
            ranges.append((start, self._end(turn, start, stop)))
        return ranges

    def _measure(self, turn: int) -> Range:
        """Where a turn begins and ends, by rendering what leads to it."""
        is_last = turn == len(self.messages) - 1
        stop = len(self.text) if is_last else self._length_of(self.render(self.messages[: turn + 1], False))
        if stop is None:
            raise self._changed(turn)
        start = self._start(turn, stop)
        if stop < start:
            raise self._changed(turn)
        return start, stop

    def _start(self, turn: int, stop: int) -> int:
        before = self.messages[:turn]
        if not before:
            return self._behind_header(before, 0)
        prompt = self.render(before, True)
        is_beginning = self.text.startswith(prompt)
        if is_beginning and self._content_follows(turn, len(prompt), stop):
            return len(prompt)
        without = self.render(before, False)
        if prompt == without:
            begin = self._length_of(without)
            if begin is None:
                raise self._changed(turn)
            return self._behind_header(before, begin)
        if not is_beginning:
            raise self._changed(turn) if self._length_of(without) is None else self._wrong_beginning(turn, prompt)
        return self._behind_header(before, len(prompt)) if without.startswith(prompt) else len(prompt)

    def _content_follows(self, turn: int, begin: int, stop: int) -> bool:
        """True if a turn's content begins at `begin`, white space apart, so that there is no header between them."""
        content = self.messages[turn]["content"].strip()
        place = self.text.find(content, begin, stop) if content else -1
        if place < 0 or self.text[begin:place].strip():
            return False
        return self.text.find(content, place + 1, stop) < 0  # else this could be a header that says the same

    def _behind_header(self, before: Sequence[Message], begin: int) -> int:
        """Where a turn's own text begins if no generation prompt says so: its header is what any two answers share.

        Spaces before the text belong to it, since tokenizers join a word with the space before it. Where there is
        nothing else before it, as with Mistral, there is no header.
        """
        answers = [self.render([*before, {"role": "assistant", "content": text}], False) for text in ("A", "B")]
        header = self.text[begin : _shared(*answers, self.text)]
        return begin + len(header.rstrip(" ")) if header.strip() else begin

    def _length_of(self, beginning: str) -> int | None:
        """How much of the text is this beginning, without what a template puts behind the last message alone."""
        while not self.text.startswith(beginning):
            shorter = beginning.rstrip()
            if shorter == beginning:
                end = next((end for end in self.ends if beginning.endswith(end)), "")
                if not end:
                    return None
                shorter = beginning.removesuffix(end)
            beginning = shorter
        return len(beginning)

    def _end(self, turn: int, start: int, stop: int) -> int:
        """The end of what is learned of a turn: without white space behind its end token."""
        written = self.text[start:stop].rstrip()
        end = next((end for end in self.ends if written.endswith(end)), "")
        lost = self._lost(turn, written, written.removesuffix(end).strip())
        if lost:
            raise self._refusal(
                turn,
                f"the chat template does not write {lost} of this assistant turn as the record has it, so it would not be "
                "learned. Pass --chat_template with a Jinja file that does, or change or remove the record.",
            )
        return start + len(written) if end else stop

    def _lost(self, turn: int, written: str, body: str) -> str:
        """What of a turn a template has left out, or an empty string. `body`: what is written, without the end token."""
        message = self.messages[turn]
        *thoughts, answer = message["content"].split(END_OF_THINKING)
        thoughts = [thoughts[0].split(THINKING)[-1]] if thoughts else []
        thoughts += [field for name in THINKING_FIELDS if isinstance(field := message.get(name), str)]
        if not body:
            return "anything"
        if any(thought.strip() not in body for thought in thoughts):
            return "the thinking"
        # Every template writes the name of a function as it is; some write the first call only, or none beside a content.
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if any(written.count(name) < names.count(name) for name in names):
            return "all tool calls"
        return "" if answer.strip() in written else "the content"

    def _places(self) -> dict[int, Range]:
        """Where the contents of messages lie in the text; none if the template does more than to copy and trim them."""
        contents = {i: content for i, message in enumerate(self.messages) if (content := message["content"].strip())}
        marked = [
            message | {"content": message["content"].replace(contents[i], OPEN + contents[i] + CLOSE, 1)}
            if i in contents
            else message
            for i, message in enumerate(self.messages)
        ]
        try:
            pieces = re.split(f"[{OPEN}{CLOSE}]", self.render(marked, False))
        except InputError:
            return {}
        if pieces[1::2] != list(contents.values()) or "".join(pieces) != self.text:
            return {}
        places, position = {}, 0
        for i, before, content in zip(contents, pieces[::2], pieces[1::2], strict=False):
            start = position + len(before)
            position = start + len(content)
            places[i] = start, position
        return places

    def _between(self, turn: int, places: dict[int, Range]) -> tuple[str, ...] | None:
        """What stands around a turn's content; None if that does not decide where the turn begins and ends."""
        around = (turn - 1, turn, turn + 1)
        if not all(i in places and self.messages[i].keys() == PLAIN_FIELDS for i in around):
            return None
        content = self.messages[turn]["content"]
        return (
            self.messages[turn - 1]["role"],
            self.text[places[turn - 1][1] : places[turn][0]],
            content[: len(content) - len(content.lstrip())],  # white space of its own, which may be kept or trimmed
            content[len(content.rstrip()) :],
            self.text[places[turn][1] : places[turn + 1][0]],
        )

    def _changed(self, turn: int) -> InputError:
        return self._refusal(
            turn,
            "the chat template writes this turn, or what comes before it, in another way once later messages follow, as "
            "templates do that drop earlier thinking. So it cannot be learned as it was written. Pass --chat_targets last "
            "to learn the last assistant turn only, or --chat_template with a Jinja file that leaves earlier turns as "
            "they are.",
        )

    def _wrong_beginning(self, turn: int, prompt: str) -> InputError:
        added = prompt[_shared(prompt, self.text) :][:SHOWN_CHARACTERS]
        hint = (
            " (in a template, line breaks and indents are text too, unless {%- and -%} take them away)"
            * added.isspace()
        )
        return self._refusal(
            turn,
            f"the chat template's generation prompt goes on with {added!r}{hint}, but the turn does not, so the model would "
            "learn another beginning than it is given at inference. Pass --chat_template with a Jinja file in which the "
            "two agree.",
        )

    def _refusal(self, turn: int, reason: str) -> InputError:
        return InputError(f"{self.place}: message {turn + self.first_number}: {reason}")


def _shared(*texts: str) -> int:
    """How many first characters all texts have in common."""
    first, last = min(texts), max(texts)
    return next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
