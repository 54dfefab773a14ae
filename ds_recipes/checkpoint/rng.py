"""The random generators of one rank, as JSON: torch (CPU and its GPU), numpy's and Python's global ones."""

import base64
import random
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, Any]:
    """The state of this rank's generators."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, python_gauss = random.getstate()
    saved = {
        "torch": _text(torch.get_rng_state()),
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), python_gauss],
    }
    if torch.cuda.is_available():
        saved["cuda"] = _text(torch.cuda.get_rng_state())
    return saved


def restore_rng(saved: dict[str, Any]) -> None:
    """Put the generators back; a GPU's state is used where there is a GPU, and left out where there is none."""
    torch.set_rng_state(_tensor(saved["torch"]))
    kind, keys, position, has_gauss, gauss = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, python_gauss = saved["python"]
    random.setstate((version, tuple(internal), python_gauss))
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(saved["cuda"]))


def derive_rng(seed: int, step: int, rank: int) -> None:
    """Seed the generators for a rank that has no saved state: at step 0, and after a change of the number of ranks."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(3, dtype=np.uint32)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
