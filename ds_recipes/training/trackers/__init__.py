"""Where a run's metrics and events go: the run folder, the screen, wandb, TensorBoard."""

from ds_recipes.training.trackers.group import Trackers, check_trackers, start_trackers

__all__ = ["Trackers", "check_trackers", "start_trackers"]
