"""Making a store: the ranks share the parts, tell each other how it goes, and stop together at the first wrong record."""

from collections.abc import Callable, Sequence

from ds_recipes.data.tokens.answers import Wrong
from ds_recipes.data.tokens.finish import finish, missing_parts
from ds_recipes.data.tokens.make import Task
from ds_recipes.data.tokens.peers import Peers
from ds_recipes.data.tokens.progress import Amount, Ticker, bytes_text, duration, progress_line, short
from ds_recipes.data.tokens.share import Report, Share
from ds_recipes.errors import InputError
from ds_recipes.world.group import World
from ds_recipes.world.together import Word, nothing, work_together


def build(name: str, task: Task, num_workers: int, peers: Peers, world: World, say: Callable[[str], None]) -> None:
    """Make all parts that are not there, and finish the store. Every rank must call it.

    Raises:
        InputError: on all ranks, the first wrong record.
        DsRecipesError: a rank failed otherwise.
    """
    phase = f"tokenising {name}"
    found = world.check(phase, lambda: missing_parts(task.folder, task.parts) if peers.is_leader else [])
    missing = world.gather(found)[peers.ranks[0]]
    there = len(task.parts) - len(missing)
    if there and world.rank == 0:
        say(f"{phase}: {there:,} of {len(task.parts):,} parts are there already")
    amount = _amount(task, missing)
    share = Share(task, missing[peers.index :: peers.size], num_workers)
    ticker = Ticker(say if world.rank == 0 else None)
    last_words: list[Word[Report]] = []

    def hear(words: list[Word[Report]]) -> None:
        share.hear(words)
        last_words[:] = words
        made_bytes, _, tokens = _sums(words, peers)
        ticker.tick(progress_line(name, amount, made_bytes, tokens, ticker.seconds))

    work_together(world, phase, share.make, share.report, hear, share.give_up)
    world.check(phase, lambda: _refuse([word.report.wrong for word in last_words]))
    leader_finishes = finish if peers.is_leader else lambda *_: None
    work_together(world, phase, lambda: leader_finishes(task.folder, task.parts), nothing, nothing, nothing)
    if missing and world.rank == 0:
        _, documents, tokens = _sums(last_words, peers)
        say(
            f"tokenised {name}: {documents:,} documents, {short(tokens)} tokens in {duration(ticker.seconds)}, "
            f"kept in {task.folder}"
        )


def _sums(words: Sequence[Word[Report]], peers: Peers) -> tuple[int, int, int]:
    """Source bytes that a group has tokenised in this build, and the documents and tokens of the parts that are whole."""
    reports = [words[rank].report for rank in peers.ranks]
    return (
        sum(one.source_bytes for one in reports),
        sum(one.documents for one in reports),
        sum(one.tokens for one in reports),
    )


def _amount(task: Task, missing: Sequence[int]) -> Amount:
    """In bytes, unpacked, if all files have them; else in rows of tables or documents of token files."""
    total = sum(part.source_bytes for part in task.parts)
    entries = f"{sum(file.num_entries for file in task.files):,}"
    if all(file.has_byte_ranges for file in task.files):
        text = bytes_text(total)
    else:
        text = f"{entries} {'documents' if task.files[0].holds_tokens else 'rows'}"
    return Amount(total, total - sum(task.parts[part].source_bytes for part in missing), text)


def _refuse(found: Sequence[Wrong | None]) -> None:
    wrong = [one for one in found if one is not None]
    if wrong:
        raise InputError(min(wrong, key=lambda one: one.part).message)
