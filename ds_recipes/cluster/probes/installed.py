"""What torch and DeepSpeed say of themselves: builds, GPUs, and the operators that work without compiling."""

import contextlib
from typing import Any

import torch


def about_torch() -> dict[str, Any]:
    """Build, NCCL, and each GPU that this process sees; JSON-able, memory in bytes."""
    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None,
        "archs": [],
        "available": torch.cuda.is_available(),
        "reason": None,
        "gpus": [],
    }
    if torch.version.cuda is None:
        return found
    with contextlib.suppress(Exception):  # a build without NCCL has no version of it
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["archs"] = torch.cuda.get_arch_list()
    if not found["available"]:
        try:
            torch.cuda.init()
        except Exception as failure:  # whatever CUDA says is what the user has to see
            found["reason"] = str(failure).splitlines()[0]
        return found
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"sm_{properties.major}{properties.minor}"
        found["gpus"].append({"name": properties.name, "capability": capability, "free": free, "total": total})
    return found


def about_deepspeed() -> dict[str, Any]:
    """Version, and its operators: those that were built at its installation, and those that could be built here."""
    import deepspeed
    from deepspeed.git_version_info import installed_ops, torch_info
    from deepspeed.ops import __compatible_ops__

    return {
        "version": deepspeed.__version__,
        "installed": sorted(name for name, there in installed_ops.items() if there),
        "compatible": sorted(name for name, there in __compatible_ops__.items() if there),
        "built_for_torch": torch_info.get("version"),
        "built_for_cuda": torch_info.get("cuda_version"),
    }
