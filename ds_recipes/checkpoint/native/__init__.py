"""Checkpoints of other programs, read as ranges: DeepSpeed's and torch.distributed's folders, state_dicts in one file."""

from ds_recipes.checkpoint.native.adapters import OverBase, lacks_base, with_adapters
from ds_recipes.checkpoint.native.distributed import DistributedReader, find_distributed, open_distributed
from ds_recipes.checkpoint.native.folders import is_deepspeed
from ds_recipes.checkpoint.native.full_state import FullStateReader, open_full_state
from ds_recipes.checkpoint.native.reader import DeepSpeedReader, open_deepspeed

__all__ = [
    "DeepSpeedReader",
    "DistributedReader",
    "FullStateReader",
    "OverBase",
    "find_distributed",
    "is_deepspeed",
    "lacks_base",
    "open_deepspeed",
    "open_distributed",
    "open_full_state",
    "with_adapters",
]
