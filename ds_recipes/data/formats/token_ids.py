"""The `tokens` format: records that are token ids already."""

from typing import Any

from ds_recipes.data.formats.fields import has, kind
from ds_recipes.data.formats.identity import fingerprint_of
from ds_recipes.data.formats.remarks import unread
from ds_recipes.data.formats.sample import Tokens
from ds_recipes.data.sources.record import Record
from ds_recipes.errors import InputError

MASKS = ("target_mask", "completion_mask", "assistant_masks", "loss_mask")
"""What a mask of the learned tokens is called: here, by TRL and transformers, and by Megatron."""

FIELDS = ("input_ids", "labels", *MASKS, "attention_mask")
NOT_LEARNED = -100
"""The label of a token that is no target, as Hugging Face models read it."""


class TokensFormat:
    """{"input_ids": [...]} and, where not all are learned, "labels" (not shifted) or a mask."""

    name = "tokens"
    splits_long = True
    joins_parts = False
    fingerprint = fingerprint_of(name, "2")  # 2: other masks than target_mask

    def read(self, record: Record) -> Tokens:
        value, where = record.value, record.where
        if "input_ids" not in value:
            raise InputError(
                f"{where}: the record has no field 'input_ids' ({has(value)}). Add it, or set --dataset to the format "
                "that the file has."
            )
        ids = _whole_numbers(value["input_ids"], "input_ids", where)
        if not ids:
            raise InputError(f"{where}: 'input_ids' is empty, so the record has no target token. Remove the record.")
        if min(ids) < 0:
            position = next(i for i, token in enumerate(ids) if token < 0)
            raise InputError(
                f"{where}: 'input_ids' has {ids[position]} at position {position}, which is no token id. Padding belongs "
                "into no record; remove it."
            )
        if 0 in _whole_numbers(value.get("attention_mask") or [], "attention_mask", where):
            raise InputError(
                f"{where}: 'attention_mask' has zeros: the record is padded. Remove the padding; rows are padded, or "
                "packed, later."
            )
        return Tokens(ids, _target_mask(ids, value, where), unread(value, FIELDS))


def _target_mask(ids: list[int], value: dict[str, Any], where: str) -> list[bool]:
    given = [name for name in ("labels", *MASKS) if value.get(name) is not None]
    if len(given) > 1:
        raise InputError(f"{where}: the record has both '{given[0]}' and '{given[1]}'. Keep one of them.")
    if given and given[0] in MASKS:
        numbers = _whole_numbers(value[given[0]], given[0], where, len(ids))
        if not set(numbers) <= {0, 1}:
            raise InputError(f"{where}: '{given[0]}' holds other values than 0 and 1. Fix or remove the record.")
        return [bool(number) for number in numbers]
    labels = value.get("labels")
    if labels is None:
        return [True] * len(ids)
    of_labels = _whole_numbers(labels, "labels", where, len(ids))
    for position, (label, token) in enumerate(zip(of_labels, ids, strict=True)):
        if label not in (token, NOT_LEARNED):
            raise InputError(
                f"{where}: 'labels' has {label} at position {position}, where 'input_ids' has {token}. Labels must not be "
                f"shifted: each equals its token, or is {NOT_LEARNED} where the token is not learned."
            )
    return [label != NOT_LEARNED for label in of_labels]


def _whole_numbers(value: object, field: str, where: str, length: int | None = None) -> list[int]:
    if not isinstance(value, list | tuple):
        raise InputError(
            f"{where}: '{field}' is {kind(value)}, not an array of whole numbers. Fix or remove the record."
        )
    allowed = {int, bool} if field in (*MASKS, "attention_mask") else {int}
    if not set(map(type, value)) <= allowed:
        position = next(i for i, number in enumerate(value) if type(number) not in allowed)
        raise InputError(
            f"{where}: '{field}' has {kind(value[position])} at position {position} that is no whole number. "
            "Fix or remove the record."
        )
    if length is not None and len(value) != length:
        raise InputError(
            f"{where}: '{field}' has {len(value):,} values for {length:,} token ids. Each token needs one; fix or remove "
            "the record."
        )
    return list(value)
