"""A tiny tokenizer, data files and worlds of threads for the tests of the data floor."""

import json
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "the quick brown fox jumps over a lazy dog and writes 日本語 letters Response: Below is"


@lru_cache
def make_tokenizer(adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 300 tokens whose padding token is its EOS token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


class ThreadWorld:
    """The parts of a World that the data floor uses, for ranks that are threads of one process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: dict[int, Any]) -> None:
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board
        self.local_rank, self.hosts = rank, ("here",) * size

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait(10)
        values = [self._board[rank] for rank in range(self.size)]
        self._barrier.wait(10)
        return values

    gather_array = gather

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def sum(self, values: Sequence[Any]) -> list[Any]:
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def barrier(self, name: str, timeout_seconds: float = 0) -> None:
        self.gather(name)

    def doing(self, phase: str) -> None:
        """Nothing to note here."""

    def wish_to_stop(self) -> str | None:
        """Nobody has one."""
        return None

    def break_off_if_asked(self) -> None:
        """Nobody is asked."""

    def leave_together(self, wish: str | None) -> None:
        """Nobody does."""
        assert self.gather(wish) == [None] * self.size

    def check(self, name: str, fn: Callable[[], Any]) -> Any:
        value, failure = None, None
        try:
            value = fn()
        except Exception as error:
            failure = error
        for other in self.gather(failure):
            if other is not None:
                raise other
        return value


def on_ranks(size: int, fn: Callable[[Any], Any]) -> list[Any]:
    """What `fn(world)` returns or raises on each rank."""
    barrier, board = threading.Barrier(size), {}
    outcomes: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            outcomes[rank] = fn(ThreadWorld(rank, size, barrier, board))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes
