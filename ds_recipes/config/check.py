"""Checks of files and folders that need no torch: what is found here has cost nobody a queue slot."""

import re
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ds_recipes.config.async_io import missing_for_async_io
from ds_recipes.config.checkpoint_settings import RESUME_WORDS
from ds_recipes.config.data_check import data_files, format_files
from ds_recipes.config.engine_settings import engine_settings
from ds_recipes.config.foreign_runs import foreign_runs
from ds_recipes.config.missing import similar, where_given
from ds_recipes.config.model_check import check_model, is_folder_name
from ds_recipes.config.schema import Config

FSDP2 = (2, 11)  # the first torch that this program's use of fully_shard was written for


def check_inputs(config: Config) -> list[str]:
    """What is wrong with the files that the settings name, one line each. Reads this host's files, no network."""
    return [
        *_engine(config),
        *_nvme(config),
        *data_files(config, "train_data"),
        *data_files(config, "validation_data"),
        *format_files(config),
        *check_model(config),
        *_tokenizer(config),
        *foreign_runs(config),
        *_run_folder(config),
        *_start_folder(config),
        *_resume_path(config),
    ]


def _engine(config: Config) -> Iterator[str]:
    """The engine's package, as far as that shows without importing it."""
    where = where_given(config, "engine", config.run.engine)
    if config.run.engine == "deepspeed" and find_spec("deepspeed") is None:
        yield f"{where}: DeepSpeed is not installed. Run 'pip install deepspeed', or use --engine fsdp, which needs only torch."
    if config.run.engine == "fsdp" and find_spec("torch") is not None:
        found = version("torch")
        if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < FSDP2:
            yield (
                f"{where}: FSDP2 needs torch {FSDP2[0]}.{FSDP2[1]} or later, and {found} is installed. Run 'pip install -U torch', "
                "or use --engine deepspeed."
            )


def _nvme(config: Config) -> Iterator[str]:
    """What NVMe offload needs of this host."""
    sharding = engine_settings(config).sharding
    if config.ds is None or "nvme" not in (sharding.optimizer_on, sharding.parameters_on):
        return
    missing = missing_for_async_io()
    if missing is not None:
        yield f"{config.ds.path}: {missing}"
    if config.checkpoint.checkpoint_format == "deepspeed":
        where = where_given(config, "checkpoint_format", "deepspeed")
        yield (
            f"{where}: {config.ds.path} has the state on NVMe, which DeepSpeed's own files leave out, so that no other program "
            "could read them. Leave one of them out."
        )
    for name in ("offload_optimizer", "offload_param"):
        section = config.ds.tree["zero_optimization"].get(name, {})
        path = Path(section.get("nvme_path", ""))
        if section.get("device") == "nvme" and not path.is_dir():
            yield (
                f"{config.ds.path}: zero_optimization.{name}.nvme_path is {path}: there is no such folder on this host; name one "
                f"on a fast local disk{similar(path)}"
            )


def _tokenizer(config: Config) -> Iterator[str]:
    text = config.model.tokenizer_name
    if text is None or not is_folder_name(text):
        return
    where, path = where_given(config, "tokenizer_name", text), Path(text)
    if not path.is_dir():
        yield f"{where}: there is no such folder{similar(path)}"
    elif not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        yield f"{where}: no tokenizer in this folder (tokenizer.json, tokenizer_config.json or tokenizer.model)"


def _run_folder(config: Config) -> Iterator[str]:
    text = config.checkpoint.save_checkpoint_path or ""
    blocking = next((path for path in (Path(text), *Path(text).parents) if path.exists()), None)
    if blocking is not None and not blocking.is_dir():
        yield f"{where_given(config, 'save_checkpoint_path', text)}: {blocking} is a file; name a folder (it is made)"


def _start_folder(config: Config) -> Iterator[str]:
    """The folder to begin from; the run folder itself need not exist yet: job scripts name it in both places."""
    text, own = config.checkpoint.load_checkpoint_path, config.checkpoint.save_checkpoint_path
    if text is not None and not Path(text).is_dir() and (own is None or Path(text).resolve() != Path(own).resolve()):
        what = (
            "is a file; name a run folder" if Path(text).exists() else f"there is no such folder{similar(Path(text))}"
        )
        yield f"{where_given(config, 'load_checkpoint_path', text)}: {what}"


def _resume_path(config: Config) -> Iterator[str]:
    """A checkpoint or run folder to begin from. A run with checkpoints of its own may go on without it."""
    text, own = config.checkpoint.resume, Path(config.checkpoint.save_checkpoint_path or "")
    path = Path(text)
    if text in RESUME_WORDS or any(own.glob("iter_*")) or path.resolve() == own.resolve():
        return
    where = where_given(config, "resume", text)
    if not path.exists():
        yield f"{where}: is not one of {', '.join(RESUME_WORDS)}, and there is no such folder{similar(path)}"
    elif not path.is_dir():
        yield f"{where}: is a file; name a checkpoint's folder, or a run folder"
    elif not (path / "manifest.json").is_file() and not any(path.glob("iter_*")):
        yield f"{where}: holds no checkpoint (no manifest.json, no iter_* folder); name a checkpoint's folder, or a run folder"
