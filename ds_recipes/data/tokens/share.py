"""The parts of a store that one rank makes, in its own process or in workers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ds_recipes.data.tokens.answers import Answer, Failed, Made, Wrong
from ds_recipes.data.tokens.make import PartMaker, Stopped, Task
from ds_recipes.data.tokens.workers import Workers
from ds_recipes.errors import DsRecipesError, InputError
from ds_recipes.world.hang.activity import progress
from ds_recipes.world.together import Word

SMALL_BYTES = 4 << 20
"""Less than this to read is done before worker processes have started."""


@dataclass(frozen=True)
class Report:
    """How far a rank is: what it made, and the first wrong record that it met."""

    source_bytes: int  # tokenised, also of parts that are in work
    documents: int  # of whole parts, as are the tokens
    tokens: int
    wrong: Wrong | None


class Share:
    """Some parts to be made. One thread makes them, while another one hears and reports."""

    def __init__(self, task: Task, parts: Sequence[int], num_workers: int) -> None:
        self._task = task
        self._parts = parts
        is_small = sum(task.parts[part].source_bytes for part in parts) < SMALL_BYTES
        self._num_workers = 0 if is_small else min(num_workers, len(parts))
        self._given_up = False
        self._limit = len(task.parts)  # parts from here on are not needed, as far as other ranks know
        self._report = Report(0, 0, 0, None)
        self._source_bytes = dict.fromkeys(parts, 0)  # tokenised of each; no key comes later, as two threads look

    def make(self) -> None:
        """Make them in their order; a wrong record ends it, not before the parts that come first are done.

        Raises:
            DsRecipesError: a worker died, or the disk is full.
        """
        for answer in self._answers():
            self._report = _with(self._report, answer)
            self._advance(answer.part, self._task.parts[answer.part].source_bytes if isinstance(answer, Made) else 0)

    def report(self) -> Report:
        """How far it is."""
        return replace(self._report, source_bytes=sum(self._source_bytes.values()))

    def hear(self, words: Sequence[Word[Report]]) -> None:
        """What lies behind a wrong record of any rank is not needed, nor is anything if a rank failed."""
        if any(word.failed for word in words):
            self.give_up()
        self._limit = min([word.report.wrong.part for word in words if word.report.wrong], default=self._limit)

    def give_up(self) -> None:
        """Make nothing more."""
        self._given_up = True

    def _goes_on(self, part: int) -> bool:
        own = self._report.wrong
        return not self._given_up and part < self._limit and (own is None or part < own.part)

    def _advance(self, part: int, source_bytes: int) -> None:
        """A sign that a part is in work, of which so much is tokenised."""
        progress()
        self._source_bytes[part] = max(self._source_bytes[part], source_bytes)

    def _goes_on_here(self, part: int, source_bytes: int) -> bool:
        """Asked from record to record by this process's own work. Worker processes do not ask, but tell how far they are."""
        self._advance(part, source_bytes)
        return self._goes_on(part)

    def _answers(self) -> Iterator[Answer]:
        if self._num_workers == 0:
            yield from self._make_here()
        else:
            with Workers(self._task, self._num_workers) as workers:
                yield from workers.make(self._parts, self._goes_on, self._advance)

    def _make_here(self) -> Iterator[Answer]:
        maker: PartMaker | None = None
        for part in self._parts:
            if not self._goes_on(part):
                return
            try:
                maker = maker or PartMaker(self._task)
                facts = maker.make(part, partial(self._goes_on_here, part))
            except InputError as error:
                yield Wrong(part, str(error))
            except Stopped:
                return
            else:
                yield Made(part, facts)


def _with(report: Report, answer: Answer) -> Report:
    if isinstance(answer, Failed):
        raise DsRecipesError(answer.text) if answer.for_user else RuntimeError(f"in a worker process:\n{answer.text}")
    if isinstance(answer, Wrong):
        wrong = report.wrong
        return replace(report, wrong=answer if wrong is None or answer.part < wrong.part else wrong)
    documents, tokens = sum(answer.facts.documents), answer.facts.tokens
    return replace(report, documents=report.documents + documents, tokens=report.tokens + tokens)
