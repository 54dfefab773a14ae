"""Settings of saving, stopping and starting again."""

from dataclasses import dataclass

from ds_recipes.config.setting import setting

CHANGES = (
    "data",
    "tokenizer",
    "dataset",
    "mixture",
    "validation_split",
    "packing",
    "truncation",
    "context_size",
    "seed",
    "global_batch_size",
    "precision",
    "optimizer",
    "model",
    "schedule",
)
"""What a checkpoint records of its run's settings, and a continued run must not change unless `allow_change` names it."""

RESUME_WORDS = ("auto", "require", "none")
"""Values of `resume` that are no path; a folder of such a name is written ./auto."""


@dataclass(frozen=True)
class CheckpointConfig:
    """The run folder, saving, stopping and starting again."""

    save_checkpoint_path: str | None = setting(
        None,
        "The run folder: checkpoints, metrics and the effective settings go there. A run folder with checkpoints is "
        "continued from its newest valid one.",
        unit="path",
    )
    load_checkpoint_path: str | None = setting(
        None,
        "Another run folder, or one checkpoint in it, where a run without checkpoints of its own begins.",
        default_doc="the run folder itself",
        unit="path",
    )
    save_interval_iteration: int = setting(
        500,
        "Save every so many optimizer steps; 0: only at the end. The last step is always saved.",
        unit="steps",
        least=0,
    )
    async_save: bool = setting(
        True,
        "Train on while a checkpoint is written: the state is copied once into host memory that is kept for it. Where that "
        "memory is not there, saving is synchronous, and a line says so.",
    )
    on_save_error: str = setting(
        "stop",
        "A checkpoint that cannot be written (disk full). stop: the run ends with status 1; continue: it is said, and tried "
        "again at the next save. The last save always has to succeed.",
        choices=("stop", "continue"),
    )
    keep_last: int | None = setting(
        None,
        "Keep this many newest checkpoints and delete older ones, once the new one has been read back. At least 2: the "
        "newest has not been loaded by anybody yet.",
        unit="checkpoints",
        least=2,
        default_doc="keep all",
    )
    keep_every: int | None = setting(
        None,
        "Of the older ones keep those whose step is a multiple of this. Needs keep_last.",
        unit="steps",
        least=1,
        default_doc="none of them",
    )
    keep_best: int | None = setting(
        None,
        "Of the older ones keep also this many with the lowest validation loss; one that was saved at a step without an "
        "evaluation (eval_interval) has none. Needs keep_last and validation data.",
        unit="checkpoints",
        least=1,
        default_doc="none of them",
    )
    checkpoint_format: str = setting(
        "ranges",
        "ranges: safetensors that any number of ranks on either engine continues; deepspeed: DeepSpeed's own files, for other "
        "programs (its zero_to_fp32.py, load_checkpoint); they are pickles, and training waits while they are written. Needs "
        "engine deepspeed.",
        choices=("ranges", "deepspeed"),
    )
    save_model: bool = setting(True, "Save the weights.")
    save_optimizer: bool = setting(
        True, "Save the optimizer's state. Without it a checkpoint is for export; training does not continue exactly."
    )
    stop_after: int | None = setting(
        None,
        "Save, stop and exit with status 75 (queue it again) this long after the start, such as 11h40m, 90m or 45s.",
        unit="duration",
        above=0,
        default_doc="no limit",
    )
    resume: str = setting(
        "auto",
        "auto: continue where the run folder has checkpoints, else start; require: refuse to start from nothing, and from an "
        "older checkpoint where the newest is damaged; none: refuse a run folder that has checkpoints. Or a path, of one "
        "checkpoint or of a run folder: begin from there; of the run folder's own checkpoints newer ones are renamed. "
        "Queued again, the run goes on from its newest.",
        is_path=True,
    )
    verify: str = setting(
        "full",
        "How a checkpoint is verified before it is used. full: sizes and hashes of all files; sizes: sizes, and hashes of the "
        "small files only (large checkpoints on slow disks).",
        choices=("full", "sizes"),
    )
    allow_change: tuple[str, ...] = setting(
        (),
        "What may differ from the checkpoint that is continued; anything else in this list is refused.",
        choices=CHANGES,
    )
