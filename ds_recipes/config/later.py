"""What this version does not have yet: each is refused by name, with what to use instead. None is ever ignored."""

import re

LORA = "LoRA is not there yet; leave it out, and the whole model is trained"

LATER_NAMES = dict.fromkeys(("lora_r", "lora_alpha", "lora_target_modules"), LORA)

LATER_VALUES = {
    ("engine", "fsdp"): "the FSDP engine is not there yet; use --engine deepspeed, whose ZeRO-3 shards the same things",
    ("precision", "fp16"): "fp16 is not there yet; use bf16, or fp32 where bfloat16 is missing",
    ("dataset", "chat"): "the chat format is not there yet; use alpaca for instructions, or text",
    ("peft_method", "lora"): LORA,
}


def refusal(name: str, text: str) -> str | None:
    """Why this value of this setting cannot be used yet, or None if nothing is known about it."""
    if name == "dataset" and re.search(r"\.py(:|$)", text):
        return "a format of your own is not there yet; write the records as {'text': ...} and use text"
    if name in ("train_data", "validation_data") and re.match(r"[0-9.]+:", text):
        return "weights before a path are not there yet; give plain paths, which are read one after the other"
    return LATER_VALUES.get((name, text.lower()))
