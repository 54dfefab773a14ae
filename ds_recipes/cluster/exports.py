"""The variables of this host's environment that ranks on other hosts need: mpirun -x, .deepspeed_env, ssh."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

USUAL = (
    "PATH",
    "LD_LIBRARY_PATH",
    "LIBRARY_PATH",
    "CPATH",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "PYTHON*",
    "OMP_*",
    "MKL_*",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_LAUNCH_BLOCKING",
    "CUDNN_*",
    "NCCL_*",
    "GLOO_*",
    "UCX_*",
    "TORCH_*",
    "PYTORCH_*",
    "TRITON_*",
    "DS_*",
    "DEEPSPEED_*",
    "HF_*",
    "TRANSFORMERS_*",
    "TOKENIZERS_*",
    "WANDB_*",
    "LANG",
    "LC_ALL",
    "CC",
    "CXX",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Names, and beginnings of names, of variables that change what a rank does. CUDA_VISIBLE_DEVICES is each host's own."""

NEVER = ("DS_ENV_FILE",)
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS)$")


def exported_names(env: Mapping[str, str], further: Sequence[str] = ()) -> list[str]:
    """Names of the usual variables that are set in `env`, and of `further` ones. Shell functions have no such name."""
    chosen = {name for pattern in USUAL for name in fnmatch.filter(env, pattern)} - set(NEVER)
    return sorted(name for name in chosen | (set(further) & set(env)) if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name))


def without_secrets(names: Iterable[str], named: Sequence[str] = ()) -> list[str]:
    """Those that may be written into a file: keys and tokens only if the user has `named` them."""
    return [name for name in names if name in named or not SECRET.search(name)]
