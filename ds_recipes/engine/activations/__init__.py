"""Activation checkpointing that every engine shares: blocks whose activations are computed again in backward."""

from ds_recipes.engine.activations.install import install_checkpointing
from ds_recipes.engine.activations.record import ActivationRecord

__all__ = ["ActivationRecord", "install_checkpointing"]
