"""Exported models go to the Hugging Face hub: what is taken, where it goes, and the proof that it lies there."""
