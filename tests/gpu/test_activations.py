"""Activation checkpointing on a GPU: inputs in pinned host memory, on a stream of their own. Run by `make gpu-test`."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ds_recipes.config.engine_settings import Checkpointing
from ds_recipes.engine.activations import install_checkpointing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use"),
]

BLOCKS = 8
ROWS, CONTEXT, HIDDEN = 4, 512, 512


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=HIDDEN,
        intermediate_size=1024,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        attention_dropout=0.2,
    )
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()


def kept_and_gradients(model: PreTrainedModel, steps: int = 2) -> tuple[int, list[torch.Tensor]]:
    """Bytes allocated between forward and backward, and the gradients, of the last of several steps."""
    ids = torch.arange(ROWS * CONTEXT, device="cuda").reshape(ROWS, CONTEXT) % 500
    for _ in range(steps):
        model.zero_grad(set_to_none=False)
        torch.manual_seed(1)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model.model(input_ids=ids, use_cache=False).last_hidden_state.float().square().mean()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
    return kept, [parameter.grad.clone() for parameter in model.model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("number", [None, 3])
def test_gradients_are_the_same_and_inputs_leave_the_gpu(number: int | None, contiguous: bool) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        _, plain = kept_and_gradients(llama())
        here, there = llama(), llama()
        on_gpu = install_checkpointing(here, Checkpointing(number, False, contiguous, False, True), "cuda")
        on_host = install_checkpointing(there, Checkpointing(number, True, contiguous, True, True), "cuda")
        kept_here, gradients_here = kept_and_gradients(here)
        kept_there, gradients_there = kept_and_gradients(there)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, plain, gradients_here))
    assert all(map(torch.equal, plain, gradients_there))
    if contiguous:  # the buffers are there before the last step
        assert on_gpu.store.buffer.is_cuda
        assert on_host.store.buffer.is_pinned()
    else:
        inputs = (number or BLOCKS) * ROWS * CONTEXT * HIDDEN * 2
        assert kept_here - kept_there > 0.8 * inputs
    for record in (on_gpu, on_host):
        taken = record.take()
        assert taken["blocks_recompute_seconds"] > 0
        assert taken["blocks_forward_seconds"] > 0
