"""What this rank runs, for comparison with the other ranks: packages, code and variables. Importing nothing of it."""

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

PREFIXES = ("NCCL_", "GLOO_", "CUDA_", "OMP_", "MKL_", "HF_", "TORCH_", "DS_", "TRANSFORMERS_", "TOKENIZERS_", "UCX_")
PATHS = ("LD_LIBRARY_PATH", "PYTHONPATH")
NAMES = (*PATHS, "LD_PRELOAD", "PYTHONHOME", "PYTHONHASHSEED", "CXX", "CC", "http_proxy", "https_proxy", "no_proxy")
A_RANKS_OWN = ("CUDA_VISIBLE_DEVICES", "DS_RECIPES_LAUNCH")
"""Launchers and schedulers give each rank its own value, or only some of them."""

SECRET = re.compile("TOKEN$|KEY|SECRET|PASSWORD", re.IGNORECASE)
HASH_DIGITS = 10


def facts(env: Mapping[str, str], root: Path) -> dict[str, Any]:
    """Python, packages by name, hashes of the code's files, and the variables that matter; JSON-able."""
    return {
        "python": f"{sys.version.split()[0]} at {sys.executable}",
        "packages": packages(),
        "root": str(root),
        "code": code_hashes(root),
        "variables": variables(env),
    }


def packages() -> dict[str, str]:
    """Versions by name; of a package that is there twice the first counts, as it does for an import."""
    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(normalised(name), distribution.version)
    return found


def normalised(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def code_hashes(root: Path) -> dict[str, str]:
    """A short SHA-256 of each Python and JSON file of the package, and of train.py, by path relative to `root`."""
    files = [root / "train.py", *(path for path in (root / "ds_recipes").rglob("*") if path.suffix in (".py", ".json"))]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:HASH_DIGITS]
        for path in sorted(files)
        if path.is_file()
    }


def code_hash(hashes: Mapping[str, str]) -> str:
    """One hash of all files."""
    return hashlib.sha256("\n".join(f"{name} {value}" for name, value in sorted(hashes.items())).encode()).hexdigest()[
        :12
    ]


def variables(env: Mapping[str, str]) -> dict[str, str]:
    """Those that change what a rank computes, or how it talks to others; of secrets only a hash."""
    chosen = {
        name: value
        for name, value in env.items()
        if (name.startswith(PREFIXES) or name in NAMES) and name not in A_RANKS_OWN
    }
    return {name: _shown(name, value) for name, value in sorted(chosen.items())}


def _shown(name: str, value: str) -> str:
    if SECRET.search(name):
        return f"(secret, hash {hashlib.sha256(value.encode()).hexdigest()[:8]})"
    if name in PATHS:  # launchers put the same folder in front again
        return os.pathsep.join(dict.fromkeys(filter(None, value.split(os.pathsep))))
    return value


def tree_root() -> Path:
    """The folder that the package was imported from: the repository, or site-packages."""
    import ds_recipes

    assert ds_recipes.__file__ is not None
    return Path(os.path.abspath(ds_recipes.__file__)).parents[1]  # noqa: PTH100 - links stay: hosts are compared by this path
