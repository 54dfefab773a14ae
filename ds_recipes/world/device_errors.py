"""What torch raises of a GPU, as an error for users: what failed, in which call, and what to set or look at."""

from collections.abc import Iterator
from contextlib import contextmanager

from ds_recipes.errors import DeviceError

OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
BROKEN = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS")

MEMORY_ADVICE = (
    "A rank takes less memory with a smaller --batch_size_training (the training stays the same if --global_batch_size does), "
    "with --activation_checkpointing, on more ranks, or with offload_optimizer and offload_param in the DeepSpeed JSON; "
    "tools/plan.py tells beforehand what fits. Start again: the run goes on from its newest checkpoint."
)
DEVICE_ADVICE = (
    "The GPU, its driver or a kernel failed, perhaps in an earlier call than the one that tells it: with CUDA_LAUNCH_BLOCKING=1 it "
    "is the same one. The kernel's log of the host (dmesg, lines with Xid) says whether it is the GPU; tools/doctor.py tries each. "
    "Start again: the run goes on from its newest checkpoint."
)


def device_error(error: BaseException, call: str | None = None) -> DeviceError | None:
    """What to say of `error`, raised by `call`, if it is torch's word for a GPU that failed or has no memory left; else None."""
    if not isinstance(error, RuntimeError):  # torch's OutOfMemoryError and AcceleratorError are of this class
        return None
    text, kind = str(error), type(error).__name__
    is_memory = kind == "OutOfMemoryError" or any(words in text for words in OUT_OF_MEMORY)
    if not is_memory and kind != "AcceleratorError" and not any(words in text for words in BROKEN):
        return None
    first = next(iter(text.splitlines()), kind)
    found = DeviceError(
        f"{'' if call is None else f'{call}: '}{first}\n{MEMORY_ADVICE if is_memory else DEVICE_ADVICE}"
    )
    found.__cause__ = error
    return found


@contextmanager
def naming_device_errors(call: str) -> Iterator[None]:
    """Name `call` in what torch raises of a GPU.

    Raises:
        DeviceError: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        found = device_error(error, call)
        if found is None:
            raise
        raise found from error
