"""What an export was asked for, beside its checkpoint and its folder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wanted:
    """The settings of an export; one value of it goes to every process of a run's export.

    Args:
        model: a folder or hub id with config and tokenizer, for checkpoints that have none with them.
        dtype: float32, bfloat16 or float16; by default what the model was trained in.
        verify: "full" compares hashes, "sizes" only the sizes of files.
        load_check: load the result in a fresh process and compare its logits.
        trust_pickle: read a foreign pickle even if the restricted loader refuses it; it can then run any code.
        lora: "merge" or "adapter", for a checkpoint with LoRA adapters.
        adapter_config: PEFT's adapter_config.json, if it does not lie with the checkpoint.
    """

    model: str | None = None
    dtype: str | None = None
    max_shard_bytes: int = 5_000_000_000
    verify: str = "full"
    load_check: bool = True
    trust_remote_code: bool = False
    trust_pickle: bool = False
    lora: str | None = None
    adapter_config: Path | None = None

    def to_json(self) -> dict[str, Any]:
        config = None if self.adapter_config is None else str(self.adapter_config)
        return asdict(self) | {"adapter_config": config}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Wanted":
        """What `to_json` made."""
        config = saved["adapter_config"]
        return cls(**{**saved, "adapter_config": None if config is None else Path(config)})
