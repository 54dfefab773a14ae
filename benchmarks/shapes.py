"""Model shapes and packed random rows that the benchmarks share."""

from typing import Any

import torch

from ds_recipes.data.batch import MicroBatch

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # the embedded default's
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "1.3b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}


def llama_config(shape: str, context_size: int) -> dict[str, Any]:
    """A config.json of a Llama of this shape, head and embedding apart."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": context_size,
        "tie_word_embeddings": False,
        **SHAPES[shape],
    }


def random_rows(
    rows: int, context_size: int, vocabulary_size: int, shortest: int, generator: torch.Generator
) -> tuple[MicroBatch, list[int]]:
    """Rows packed with random documents, and the documents' lengths in tokens.

    Lengths are uniform from `shortest` to `context_size`, the last document of a row cut to fit. Every token but a
    document's first is a target.
    """
    lengths: list[int] = []
    positions = []
    for _ in range(rows):
        room = context_size
        while room:
            drawn = int(torch.randint(min(shortest, room), context_size + 1, (1,), generator=generator))
            lengths.append(min(drawn, room))
            positions.append(torch.arange(lengths[-1]))
            room -= lengths[-1]
    position_ids = torch.cat(positions)  # [rows * context]
    input_ids = torch.randint(0, vocabulary_size, (rows * context_size,), generator=generator)
    target_index = torch.nonzero(position_ids[1:] > 0).flatten()
    batch = MicroBatch(
        input_ids=input_ids.view(rows, context_size),
        position_ids=position_ids.view(rows, context_size),
        target_index=target_index,
        target_ids=input_ids[target_index + 1],
        num_tokens=rows * context_size,
        num_samples=len(lengths),
        row_ids=tuple(range(rows)),
    )
    return batch, lengths
