"""Continual pretraining and instruction tuning of Hugging Face causal language models with DeepSpeed ZeRO or FSDP2."""

__version__ = "0.1.0"
