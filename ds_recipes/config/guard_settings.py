"""Settings of what watches over the steps."""

from dataclasses import dataclass

from ds_recipes.config.setting import setting


@dataclass(frozen=True)
class GuardConfig:
    """Bad steps: gradients that are not finite, and losses that jump."""

    max_skipped_steps: int = setting(
        10,
        "A step whose loss or gradient is not finite is skipped on all ranks. After this many in a row the run saves the last "
        "good state and ends with status 1.",
        unit="steps",
        least=1,
    )
    checksum_interval: int = setting(
        0,
        "Every so many steps, and in each step that a planned save follows, compare what ranks hold alike and two runs of a "
        "micro-batch; a difference, which is silent corruption, ends the run before the next save. 0: never.",
        unit="steps",
        least=0,
    )
    spike_window: int = setting(
        128, "Losses of so many latest good steps say what is normal; 0 turns the watch off.", unit="steps", least=0
    )
    spike_sigma: float = setting(
        6.0,
        "A loss is a spike if it lies so many robust standard deviations (1.4826 x median absolute deviation) above the "
        "median of the window.",
        above=0,
    )
    spike_patience: int = setting(4, "So many spikes in a row are a divergence.", unit="steps", least=1)
    spike_recovery: str = setting(
        "none",
        "What follows a divergence. none: it is recorded; rewind: the run goes back to the last checkpoint before it, and "
        "leaves out the data of the steps that diverged.",
        choices=("none", "rewind"),
    )
    spike_recoveries: int = setting(3, "The run ends at a divergence after so many recoveries.", unit="times", least=1)
