"""DeepSpeed's ZeRO behind the engine interface: stage 3, and stages 1 and 2."""
