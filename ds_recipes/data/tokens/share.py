"""The parts of a store that one rank makes, in its own process or in workers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

    parts: int
    documents: int
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

    def make(self) -> None:
        """Make them in their order; a wrong record ends it, not before the parts that come first are done.

        Raises:
            DsRecipesError: a worker died, or the disk is full.
        """
        for answer in self._answers():
            progress()
            self._report = _with(self._report, answer)

    def report(self) -> Report:
        """How far it is."""
        return self._report

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

    def _goes_on_here(self, part: int) -> bool:
        """Asked from record to record by this process's own work, which so comes further; worker processes do not ask."""
        progress()
        return self._goes_on(part)

    def _answers(self) -> Iterator[Answer]:
        if self._num_workers == 0:
            yield from self._make_here()
        else:
            with Workers(self._task, self._num_workers) as workers:
                yield from workers.make(self._parts, self._goes_on)

    def _make_here(self) -> Iterator[Answer]:
        maker: PartMaker | None = None
        for part in self._parts:
            if not self._goes_on(part):
                return
            try:
                maker = maker or PartMaker(self._task)
                facts = maker.make(part, lambda part=part: self._goes_on_here(part))  # type: ignore[misc]
            except InputError as error:
                yield Wrong(part, str(error))
            except Stopped:
                return
            else:
                yield Made(part, facts)


def _with(report: Report, answer: Answer) -> Report:
    if isinstance(answer, Failed):
        raise DsRecipesError(answer.text) if answer.for_user else RuntimeError(f"in a worker process:\n{answer.text}")
    parts, documents, tokens, wrong = report.parts, report.documents, report.tokens, report.wrong
    if isinstance(answer, Wrong):
        first = answer if wrong is None or answer.part < wrong.part else wrong
        return Report(parts, documents, tokens, first)
    return Report(parts + 1, documents + sum(answer.facts.documents), tokens + answer.facts.tokens, wrong)
