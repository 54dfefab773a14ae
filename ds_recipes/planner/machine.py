"""The machine that is planned for: its GPUs' memory and arithmetic, and what they cost. Makers' figures, not measurements."""

import re
from dataclasses import dataclass

from ds_recipes.errors import ConfigError

GB = 10**9
UNITS = {"": GB, "GB": GB, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}

CONTEXT_BYTES = 1.5 * GB
"""Set aside on each GPU for the CUDA context, NCCL's channels and the libraries' workspaces. An assumption."""

FRAGMENTATION = 0.05
"""Of the tensors' bytes: what the caching allocator holds and cannot use. An assumption."""

PROCESS_BYTES = 3 * GB
"""Set aside in host memory for each rank's Python, torch and pinned staging buffers. An assumption."""


@dataclass(frozen=True)
class Gpu:
    """Dense tensor-core peak in 16 bits and peak in float32, in TFLOPS, by the maker's data sheet."""

    memory_bytes: int
    half_tflops: float
    float32_tflops: float


GPUS = {
    "H100": Gpu(80 * GB, 989.0, 67.0),
    "H200": Gpu(141 * GB, 989.0, 67.0),
    "A100": Gpu(80 * GB, 312.0, 19.5),
    "V100": Gpu(32 * GB, 125.0, 15.7),
}
"""NVIDIA's data sheets of the SXM forms: H100, H200, A100 80GB, V100 32GB."""


def memory_bytes(text: str) -> int:
    """Read 80GB, 79.6GiB or 81559MiB; a bare number is in GB (10^9 bytes).

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = None if found is None else UNITS.get(found[2].upper())
    if found is None or unit is None or float(found[1]) <= 0:
        raise ConfigError([f"--gpu_memory takes a size such as 80GB or 79.6GiB, not {text!r} (command line)"])
    return int(float(found[1]) * unit)


def needed_bytes(tensor_bytes: float) -> float:
    """What a GPU must have for tensors of so many bytes."""
    return tensor_bytes * (1 + FRAGMENTATION) + CONTEXT_BYTES
