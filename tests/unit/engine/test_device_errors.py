"""What torch raises of a GPU is told as an error for users, with the call that it came out of; anything else is left as it is."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ds_recipes.engine.base import Engine, calls_of_engines
from ds_recipes.errors import DeviceError, InputError
from ds_recipes.world.device_errors import DEVICE_ADVICE, MEMORY_ADVICE, device_error
from tests.ranks.failing import ENGINES, ITERATORS

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def raising(name: str, error: Exception) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise error

    def items(*_: Any) -> Iterator[Any]:
        yield 1
        raise error

    chosen = items if name in ITERATORS else call
    chosen.__name__ = name
    return chosen


def engine_class(engine: str) -> type[Engine]:
    module, name = ENGINES[engine]
    found: type[Engine] = getattr(importlib.import_module(module), name)
    return found


def used(engine: type[Engine], name: str) -> None:
    made: Any = object.__new__(engine)
    found = getattr(made, name)(*[None] * 4)
    if name in ITERATORS:
        list(found)


def test_the_interface_is_what_the_loop_and_the_checks_call() -> None:
    assert {"backward", "update", "evaluate", "logits", "shards", "load_shards", "measured"} <= set(calls_of_engines())


@pytest.mark.parametrize("name", calls_of_engines())
@pytest.mark.parametrize("engine", ENGINES)
def test_each_call_of_an_engine_names_itself(engine: str, name: str) -> None:
    whole = engine_class(engine)
    with pytest.raises(DeviceError) as caught:
        used(type("Mine", (whole,), {name: raising(name, MEMORY)}), name)
    assert str(caught.value) == f"Mine.{name}: CUDA out of memory. Tried to allocate 2.00 GiB.\n{MEMORY_ADVICE}"
    assert caught.value.__cause__ is MEMORY
    for other in (KeyError("hidden_size"), RuntimeError("shapes differ"), InputError("out of memory")):
        with pytest.raises(type(other)) as kept:
            used(type("Mine", (whole,), {name: raising(name, other)}), name)
        assert kept.value is other
    assert hasattr(getattr(whole, name), "__wrapped__"), "the engine's own is not watched"


@pytest.mark.parametrize(
    "error, advice",
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), DEVICE_ADVICE),
        (torch.AcceleratorError("the device was lost"), DEVICE_ADVICE),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), MEMORY_ADVICE),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DEVICE_ADVICE),
        (RuntimeError("CUDA error: out of memory"), MEMORY_ADVICE),  # of pinned memory
        (torch.OutOfMemoryError(""), MEMORY_ADVICE),
    ],
)
def test_the_advice_is_for_what_it_was(error: RuntimeError, advice: str) -> None:
    found = device_error(error, "the copy")
    assert found is not None and str(found) == f"the copy: {str(error) or 'OutOfMemoryError'}\n{advice}"
    assert found.__cause__ is error
