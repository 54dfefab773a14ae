"""Activation checkpointing on plain models: the same gradients, and what is kept meanwhile."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.alive_bytes import AliveBytes
from ds_recipes.config.engine_settings import Checkpointing
from ds_recipes.engine.activations import install_checkpointing, record, store
from ds_recipes.engine.activations.blocks import segment_numbers
from ds_recipes.errors import InputError
from tests.unit.models.tiny import CONFIGS, tiny_model

BLOCKS = 5
IDS = torch.arange(64).reshape(2, 32) % 97
INPUT_BYTES = 2 * 32 * 32 * 4


def asked(number: int | None = None, **others: bool) -> Checkpointing:
    defaults = {"on_cpu": False, "contiguous": False, "synchronize": False, "profile": False}
    return Checkpointing(number, **(defaults | others))


def llama(blocks: int = BLOCKS, dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config).train()


def loss_of(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float().square().mean()
    return loss


def gradients(model: nn.Module, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = loss_of(model, ids)
    loss.backward()
    after = torch.rand(())  # backward must leave the random state alone
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**found, "loss": loss.detach(), "random": after}


def assert_same(model: nn.Module, plain: dict[str, torch.Tensor], ids: torch.Tensor = IDS) -> None:
    found = gradients(model, ids)
    assert found.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(plain[name], found[name])] == []


@pytest.mark.parametrize(
    ("blocks", "number", "lengths"),
    [(5, 2, [3, 2]), (5, 3, [2, 2, 1]), (8, 3, [3, 3, 2]), (4, 1, [4]), (3, None, [1, 1, 1]), (3, 9, [1, 1, 1])],
)
def test_segments_are_consecutive_and_nearly_equal(blocks: int, number: int | None, lengths: list[int]) -> None:
    numbers = segment_numbers(blocks, number)
    assert numbers == sorted(numbers)
    assert [numbers.count(index) for index in range(numbers[-1] + 1)] == lengths


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_of_every_family_are_the_same(family: str) -> None:
    plain = gradients(tiny_model(family).train())
    for number in (1, 2):
        model = tiny_model(family).train()
        install_checkpointing(model, asked(number), "cpu")
        assert_same(model, plain)


@pytest.mark.parametrize("number", [1, 2, 3, BLOCKS, None])
@pytest.mark.parametrize("contiguous", [False, True])
def test_dropout_repeats_itself_and_steps_do_not_mix(number: int | None, contiguous: bool) -> None:
    plain, model = llama(dropout=0.3), llama(dropout=0.3)
    assert not torch.equal(loss_of(plain), loss_of(plain)), "no dropout: the test shows nothing"
    install_checkpointing(model, asked(number, contiguous=contiguous), "cpu")
    for ids in (IDS, IDS.flip(1), IDS[:1], IDS):
        assert_same(model, gradients(plain, ids), ids)
        with torch.no_grad():
            loss_of(model)


@pytest.mark.parametrize("number", [2, None])
def test_autocast_is_the_same_again(number: int | None) -> None:
    plain, model = llama(), llama()
    install_checkpointing(model, asked(number), "cpu")
    found = []
    for each in (plain, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(each)
        loss.backward()  # outside, as users do
        found.append([parameter.grad for parameter in each.parameters()])
    assert all(map(torch.equal, *found))


def test_two_forwards_before_their_backwards() -> None:
    plain, model = llama(), llama()
    install_checkpointing(model, asked(2, contiguous=True), "cpu")
    for each in (plain, model):
        (loss_of(each) + loss_of(each, IDS.flip(1))).backward()
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    assert all(torch.allclose(one.grad, other.grad, rtol=0, atol=1e-8) for one, other in pairs)


def test_frozen_blocks_and_a_frozen_embedding() -> None:
    plain, model = llama(), llama()
    for each in (plain, model):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("layers.2.self_attn" in name or "layers.4" in name)
    install_checkpointing(model, asked(2), "cpu")
    assert_same(model, gradients(plain))


class Pair(GradientCheckpointingLayer):
    """A block that takes nested arguments and returns a tuple, of which the next one takes both tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, hidden: torch.Tensor, carried: torch.Tensor, *, per_layer: dict[str, Any], kind: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scale, (shift, _) = per_layer[kind]
        hidden = torch.tanh(self.first(hidden) * scale + carried)
        return hidden + shift, torch.sigmoid(self.second(hidden))


class PairModel(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden) -> None:
        super().__init__(PretrainedConfig())
        torch.manual_seed(0)
        self.embedding = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Pair() for _ in range(4))
        self.between = between

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = carried = self.embedding(values)
        per_layer = {"a": (self.embedding.bias * 2, (values, None)), "b": (torch.ones(()), [hidden, 3])}
        for index, layer in enumerate(self.layers):
            hidden, carried = layer(hidden, carried, per_layer=per_layer, kind="ab"[index % 2])
            hidden = self.between(hidden)
        return (hidden * carried).sum()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("between", [lambda hidden: hidden, lambda hidden: hidden * 2, lambda hidden: hidden.mul_(2)])
def test_tuples_nested_arguments_and_work_between_blocks(
    number: int, between: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    plain, model = PairModel(between), PairModel(between)
    install_checkpointing(model, asked(number), "cpu")
    for each in (plain, model):
        each(values).backward()
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)


def test_an_argument_changed_in_place_is_noticed() -> None:
    model = PairModel()
    install_checkpointing(model, asked(2), "cpu")
    values = torch.randn(3, 8)
    loss = model(values)
    values.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


class Fickle(Pair):
    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        Fickle.calls += 1
        hidden, carried = super().forward(*args, **kwargs)
        return (hidden if Fickle.calls % 2 else hidden.exp().exp()), carried


def test_a_block_that_computes_something_else_the_second_time_is_noticed() -> None:
    model = PairModel()
    model.layers = nn.ModuleList([Fickle()])
    install_checkpointing(model, asked(), "cpu")
    Fickle.calls = 1
    with pytest.raises(RuntimeError, match="not deterministic"):
        model(torch.randn(3, 8)).backward()


def alive_after_forward(number: int | None) -> tuple[int, int]:
    """Bytes alive between forward and backward, and after backward, without parameters and gradients."""
    model = llama()
    if number != 0:
        install_checkpointing(model, asked(number), "cpu")
    model.zero_grad()
    with AliveBytes([*model.parameters(), *model.buffers()]) as alive:
        loss = model.model(input_ids=IDS, use_cache=False).last_hidden_state.sum()
        kept = alive.now
        loss.backward()
    del loss
    grads = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    return kept, alive.now - grads


def test_each_checkpoint_keeps_one_block_input() -> None:
    kept = {number: alive_after_forward(number)[0] for number in (0, 1, 2, 3, BLOCKS)}
    for number in (2, 3, BLOCKS):
        each = (kept[number] - kept[1]) / (number - 1)
        assert abs(each - INPUT_BYTES) < 0.02 * INPUT_BYTES, kept
    assert kept[0] - kept[BLOCKS] > 8 * BLOCKS * INPUT_BYTES, kept


@pytest.mark.parametrize("number", [1, 2, None])
def test_nothing_is_kept_after_backward(number: int | None) -> None:
    assert alive_after_forward(number)[1] == 0


def test_evaluation_keeps_nothing() -> None:
    model = llama()
    found = install_checkpointing(model, asked(2, contiguous=True, profile=True), "cpu")
    with torch.no_grad(), AliveBytes([*model.parameters(), *model.buffers()]) as alive:
        loss = loss_of(model)
        assert alive.now == loss.nbytes
    assert found.store.buffer.numel() == 0
    assert set(found.take().values()) == {0.0}


def test_a_forward_without_backward_is_forgotten() -> None:
    model = llama()
    install_checkpointing(model, asked(2), "cpu")
    fails = model.model.layers[3].mlp.register_forward_hook(lambda *_: 1 / 0)
    gc.disable()
    try:
        with AliveBytes([*model.parameters(), *model.buffers()]) as alive, pytest.raises(ZeroDivisionError):
            loss_of(model)
        assert alive.now == 0, "the failed forward is still held"
    finally:
        gc.enable()
    fails.remove()
    assert_same(model, gradients(llama()))


def test_the_buffer_is_made_once_and_anew_for_another_shape() -> None:
    model = llama()
    found = install_checkpointing(model, asked(3, contiguous=True), "cpu")
    places = set()
    for _ in range(3):
        loss_of(model).backward()
        places.add(found.store.buffer.data_ptr())
    assert len(places) == 1
    assert found.store.buffer.shape == (3, 2, 32, 32)
    seen: list[torch.Tensor] = []
    model.model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    loss_of(model).backward()
    assert torch.equal(found.store.buffer[1], seen[0])
    loss_of(model, IDS[:1]).backward()
    assert found.store.buffer.shape == (3, 1, 32, 32)


def test_profile_measures_and_is_emptied() -> None:
    model = llama()
    found = install_checkpointing(model, asked(2, profile=True), "cpu")
    for _ in range(2):
        loss_of(model).backward()
    taken = found.take()
    assert taken["checkpoints_gib"] * 2**30 == 2 * INPUT_BYTES
    assert taken["blocks_forward_seconds"] > 0
    assert taken["blocks_recompute_seconds"] > 0
    assert set(found.take().values()) == {0.0}
    assert install_checkpointing(llama(), asked(2), "cpu").take() == {}


def test_synchronize_waits_at_each_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(record, "wait_for", waits.append)
    for synchronize, expected in ((False, 0), (True, 2 * 3)):
        model = llama()
        install_checkpointing(model, asked(3, synchronize=synchronize), "cpu")
        loss_of(model).backward()
        assert len(waits) == expected


class FakeStream:
    """A stream on a machine without a GPU: it notes what waits for what."""

    log: ClassVar[list[str]] = []

    def __init__(self, device: Any = None) -> None:
        self.name = "current" if device is None else "copies"

    def wait_stream(self, other: "FakeStream") -> None:
        FakeStream.log.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("contiguous", [False, True])
def test_inputs_in_host_memory(monkeypatch: pytest.MonkeyPatch, contiguous: bool) -> None:
    """The GPU's part is played by the CPU; tests/gpu has the real one."""
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: FakeStream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    pinned: list[torch.Tensor] = []
    empty = torch.empty

    def pinned_empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return (pinned.append(made) or made) if pin_memory else made  # type: ignore[func-returns-value]

    monkeypatch.setattr(store.torch, "empty", pinned_empty)
    fetch = store.KeptOnHost.fetch
    monkeypatch.setattr(store.KeptOnHost, "fetch", lambda kept: (FakeStream.log.append("fetch"), fetch(kept))[1])
    plain, model = gradients(llama()), llama()
    found = install_checkpointing(model, asked(2, on_cpu=True, contiguous=contiguous), "cpu")
    found.store = store.Store(2, torch.device("cuda"), on_cpu=True, contiguous=contiguous)
    for _ in range(2):
        FakeStream.log.clear()
        assert_same(model, plain)
    away, back = "copies waits for current", "current waits for copies"
    ahead = "fetch"  # of the first segment's input, while the second one is computed again
    assert FakeStream.log == [away, away, "fetch", back, ahead, "fetch", back]
    assert str(found) == "inputs of 2 of 5 blocks kept, in host memory" + ", in one buffer" * contiguous
    assert [tuple(made.shape) for made in pinned] == ([(2, 2, 32, 32)] if contiguous else [(2, 32, 32)] * 4)
    assert all(made.abs().sum() > 0 for made in pinned)


def test_names_stay_and_a_model_without_blocks_is_refused() -> None:
    model = llama()
    names = [name for name, _ in model.named_modules()], type(model.model.layers[0]).__name__
    install_checkpointing(model, asked(), "cpu")
    assert names == ([name for name, _ in model.named_modules()], type(model.model.layers[0]).__name__)
    bare = PairModel()
    bare.layers = nn.ModuleList()
    with pytest.raises(InputError, match="no blocks") as refused:
        install_checkpointing(bare, asked(), "cpu")
    assert "\n" not in str(refused.value)
