"""Which row comes when: a permutation that is computed, never stored, and the hash of the rows that a run has taken."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

BLANK = -1
"""Stands for a blank row in the rolling hash."""

ROUNDS = 32
GOLDEN = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio: its multiples are spread evenly over 64 bits (Steele, Lea and Flood, 2014)."""

STEPS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
LAST_SHIFT = np.uint64(31)
"""SplitMix64's constants. Products of uint64 keep their low 64 bits on every platform."""

Ints = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]


def permute(index: Ints, count: int | Ints, key: Words) -> Ints:
    """Where a pseudo-random permutation of range(`count`) puts each `index` of [0, count); int64 of the same shape.

    `key` chooses the permutation. `count`, at most 2**62, and `key` may have a value for each index. An index costs the
    same wherever it lies and however large `count` is.

    This is the swap-or-not shuffle (Hoang, Morris and Rogaway, "An enciphering scheme based on a card shuffle", CRYPTO
    2012). Each round pairs every number x with pivot - x, and a bit that the two share says whether they swap. It works
    on any count as it is, and permutations of few rows come out equally likely (tests/unit/data/test_order.py). A Feistel
    network with cycle walking (Black and Rogaway, CT-RSA 2002) needs a domain far larger than such a count for that. Of
    the rounds, 12 suffice for a dozen rows; the others are for large counts: two numbers that get the same bits keep
    their distance, one pair in 2**32.
    """
    number = np.asarray(index, np.int64).astype(np.uint64)
    total = np.asarray(count, np.int64).astype(np.uint64)
    for round_key in range(1, ROUNDS + 1):
        word = _mix(key + (round_key * GOLDEN & 0xFFFFFFFFFFFFFFFF))
        pivot = word % total
        partner = pivot - number + (number > pivot) * total  # uint64 wraps around below zero, and back
        swaps = _mix(word + np.maximum(number, partner) * GOLDEN) >> 63
        number = np.where(swaps == 1, partner, number)
    return number.astype(np.int64)


def order_key(seed: int, stream: int | Ints, epoch: int | Ints) -> Words:
    """The key of a stream's permutation in an epoch, uint64; `stream` and `epoch` are numbers or arrays of one shape."""
    word = np.full(1, seed, np.uint64)
    for part in (stream, epoch):
        word = _mix(_mix(word + GOLDEN) + np.atleast_1d(np.asarray(part, np.int64)).astype(np.uint64))
    return _mix(word + GOLDEN)


def next_hash(previous_hex: str, corpus: str, row_ids: Sequence[int]) -> str:
    """The rolling hash after a step that trains `row_ids` (of all ranks, in order) of the data with fingerprint `corpus`.

    16 hex digits, xxh3-64 chained.
    """
    content = np.array(row_ids, "<i8").tobytes()
    return str(xxhash.xxh3_64(f"{previous_hex}:{corpus}:".encode() + content).hexdigest())


def _mix(word: Words) -> Words:
    """A bijection of 64 bits in which each output bit depends on all input bits: the finaliser of SplitMix64.

    Written out, since a run must have one order on every version of numpy: its `Generator` may change (NEP 19).
    """
    for shift, factor in STEPS:
        word = (word ^ (word >> shift)) * factor
    return word ^ (word >> LAST_SHIFT)
