"""Checkpoints of other programs, read as ranges: DeepSpeed's own folders, and whole state_dicts in one file."""

from ds_recipes.checkpoint.native.adapters import with_adapters
from ds_recipes.checkpoint.native.folders import is_deepspeed
from ds_recipes.checkpoint.native.full_state import FullStateReader, open_full_state
from ds_recipes.checkpoint.native.reader import DeepSpeedReader, open_deepspeed

__all__ = ["DeepSpeedReader", "FullStateReader", "is_deepspeed", "open_deepspeed", "open_full_state", "with_adapters"]
