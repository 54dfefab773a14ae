"""Continual pretraining and instruction tuning of Hugging Face causal language models with DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
