"""Run folders of other programs, named before anything is written into them: what they are, and how their weights are used."""

from collections.abc import Iterator
from pathlib import Path

from ds_recipes.config.checkpoint_settings import RESUME_WORDS
from ds_recipes.config.missing import where_given
from ds_recipes.config.schema import Config

CONVERT = "python tools/convert_to_hf.py --ckpt {path} --model THE_MODEL_THAT_WAS_TRAINED --out DIR"

KINDS = (
    ("Kotoba-Recipes", "iter_*/model.pt", CONVERT),
    ("Megatron-LM", "iter_*/mp_rank_*/*.pt", "its own converter to Hugging Face"),
    ("DeepSpeed", "global_step*/*_model_states.pt", CONVERT),
    ("torch.distributed.checkpoint", "*/.metadata", CONVERT),
    ("the Hugging Face Trainer", "checkpoint-*/trainer_state.json", None),
)
"""The program, a file that its runs have, and what makes a Hugging Face folder of a checkpoint (None: it is one)."""


def foreign_runs(config: Config) -> Iterator[str]:
    """The folders to continue or to begin from that hold another program's checkpoints, and none of ours."""
    settings = config.checkpoint
    given = {
        "resume": None if settings.resume in RESUME_WORDS else settings.resume,
        "load_checkpoint_path": settings.load_checkpoint_path,
        "save_checkpoint_path": settings.save_checkpoint_path,
    }
    told: set[Path] = set()
    for name, text in given.items():
        if text is None or Path(text).resolve() in told or not Path(text).is_dir():
            continue
        found = _checkpoint(Path(text))
        if found is None or (name == "save_checkpoint_path" and not found[1].name.startswith("iter_")):
            continue  # what has other names is in nobody's way
        told.add(Path(text).resolve())
        yield f"{where_given(config, name, text)}: {_advice(*found)}"


def _checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Which of `KINDS` a folder is a run of, or a checkpoint of, and its newest checkpoint; None where some is ours."""
    if (folder / "manifest.json").is_file() or any(folder.glob("iter_*/manifest.json")):
        return None
    for kind, (_, pattern, _) in enumerate(KINDS):
        first, _, rest = pattern.partition("/")
        if folder.match(first) and any(folder.glob(rest)):
            return kind, folder
        inside = [path.relative_to(folder).parts[0] for path in folder.glob(pattern)]
        if inside:
            return kind, folder / max(inside, key=lambda name: (len(name), name))
    return None


def _advice(kind: int, checkpoint: Path) -> str:
    program, _, convert = KINDS[kind]
    how = (
        "name it"
        if convert is None
        else f"make a Hugging Face folder of it ({convert.format(path=checkpoint)}) and name that"
    )
    return (
        f"holds checkpoints of {program} (the newest is {checkpoint.name}), and none of this program, which can continue only "
        f"its own. To begin with their weights, {how} as --model_name, with a new --save_checkpoint_path and without "
        "--load_checkpoint_path. The optimizer's state and the place in the data are not taken over."
    )
