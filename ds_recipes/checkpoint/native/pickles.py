"""Read a file that torch.save wrote without running any code of its pickle, its tensors mapped and not loaded.

A pickle is a program. torch's restricted loader (`weights_only=True`) runs only what makes tensors and plain containers;
DeepSpeed's files need a few names more, for which it gets a class of ours that keeps what it is given and does nothing.
What needs yet more is refused, with its name, unless the caller trusts whoever wrote the file.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from ds_recipes.errors import InputError

PLACEHOLDERS = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
)
"""Names that DeepSpeed and its callers put beside the tensors. None of them is imported or called."""

MAX_PICKLE_BYTES = 256 << 20
"""The pickle of a file holds names and shapes; tensors lie beside it. It is the only part that is read into memory."""


class Inert:
    """Stands in for an object of a pickle: keeps the arguments and the state that it is given."""

    def __new__(cls, *arguments: Any) -> "Inert":
        made = object.__new__(cls)
        made.arguments = arguments
        return made

    arguments: tuple[Any, ...]

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __int__(self) -> int:
        """The value of an enumeration's member."""
        return int(self.arguments[0])


def load_pickle(path: Path, trust: bool) -> Any:
    """What `torch.save` wrote to `path`; its tensors are views of the mapped file, on the CPU.

    Args:
        trust: run the pickle's own code where the restricted loader refuses it.

    Raises:
        InputError: damaged, of the format before torch 1.6, or in need of names that are not known to be harmless.
    """
    _check_archive(path)
    placeholders = [(Inert, name) for name in PLACEHOLDERS]
    try:
        with torch.serialization.safe_globals(placeholders):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a damaged or hostile pickle makes the loader raise
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if trust:
            return _load_trusting(path)
        if refused is None:
            raise InputError(
                f"{path}: cannot be read ({_short(error)}). Copy it again from where it was written."
            ) from error
        raise InputError(
            f"{path}: to read it, {refused[1]} would have to be called. A pickle can run any program, so nothing of it was "
            "run. If you trust whoever wrote the file, add --trust_pickle."
        ) from error


def _load_trusting(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:  # the pickle's own code may raise anything
        raise InputError(f"{path}: cannot be read ({_short(error)}), though it was trusted.") from error


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def _check_archive(path: Path) -> None:
    """See that it is a zip archive as torch writes it: nothing in it is compressed, and its pickle is small.

    Raises:
        InputError: it is not, or the file does not exist.
    """
    if not path.is_file():
        raise InputError(f"{path}: missing, or not a file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: cut short, damaged, or in the format of before torch 1.6, which cannot be mapped ({error}). Copy it again, "
            "or write it anew with: torch.save(torch.load(OLD), NEW)."
        ) from error
    for entry in entries:
        is_pickle = entry.filename.endswith(".pkl")
        if entry.compress_type != zipfile.ZIP_STORED or (is_pickle and entry.file_size > MAX_PICKLE_BYTES):
            raise InputError(
                f"{path}: {entry.filename} in it is compressed or has {entry.file_size:,} bytes; torch.save writes no such file"
            )
