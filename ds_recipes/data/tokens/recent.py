"""The latest things that were made, for any number of threads."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Keeps what was asked for latest. Two threads that ask for a new thing at once may both make it."""

    def __init__(self, most: int, make: Callable[[int], T]) -> None:
        self._most = most
        self._make = make
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, T] = OrderedDict()

    def get(self, number: int) -> T:
        """The thing of that number, made if it is not kept."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        made = self._make(number)
        with self._lock:
            self._kept[number] = made
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return made
