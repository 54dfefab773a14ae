"""What this version does not have yet: each is refused by name, with what to use instead. None is ever ignored."""

LORA = "LoRA is not there yet; leave it out, and the whole model is trained"

LATER_NAMES = dict.fromkeys(
    ("lora_r", "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "lora_target_modules", "use_lora", "use_peft"),
    LORA,
)

LATER_VALUES = {
    ("peft_method", "lora"): LORA,
}


def refusal(name: str, text: str) -> str | None:
    """Why this value of this setting cannot be used yet, or None if nothing is known about it."""
    return LATER_VALUES.get((name, text.lower()))
