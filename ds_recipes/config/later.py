"""What this version does not have yet: each is refused by name, with what to use instead. None is ever ignored."""

import re

LORA = "LoRA is not there yet. Leave it out: the whole model is trained"

LATER_NAMES = {name: LORA for name in ("lora_r", "lora_alpha", "lora_target_modules")}

LATER_VALUES = {
    ("engine", "fsdp"): "the FSDP engine is not there yet. Use --engine deepspeed: ZeRO-3 shards the same things",
    ("precision", "fp16"): "fp16 is not there yet. Use --precision bf16, or fp32 where bfloat16 is missing",
    ("dataset", "chat"): "the chat format is not there yet. Use --dataset alpaca for instructions, or text",
    ("peft_method", "lora"): LORA,
}


def refusal(name: str, text: str) -> str | None:
    """Why this value of this setting cannot be used yet, or None if nothing is known about it."""
    if name == "dataset" and re.search(r"\.py(:|$)", text):
        return "a format of your own is not there yet. Write the records as {'text'} and use --dataset text"
    if name in ("train_data", "validation_data") and re.match(r"[0-9.]+:", text):
        return (
            f"weights before a path are not there yet ({text!r}). Give plain paths: they are read one after the other"
        )
    return LATER_VALUES.get((name, text.lower()))
