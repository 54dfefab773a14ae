"""A grown vocabulary: old rows as they were, new rows as asked for, for any split of the tensors into slices."""

import copy
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

from ds_recipes.errors import InputError
from ds_recipes.models import vocabulary
from ds_recipes.models.load import ModelSource
from ds_recipes.models.skeleton import build_skeleton, parameter_shapes, tied_names
from ds_recipes.models.vocabulary import grown_weights, mean_row, random_rows, rows_needed, with_vocabulary_size
from ds_recipes.ranges import NONE_MISSED
from tests.unit.models.tiny import CONFIGS, tiny_model

CPU = torch.device("cpu")
OLD_ROWS = 97
FAMILIES = ["llama", "llama_tied", "phi", "gpt2", "gemma2", "mixtral", "gpt_neox"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> ModelSource:
    """A folder of several small files, and the source that `find_model` would give for it."""
    tiny_model(family).to(dtype).save_pretrained(folder, max_shard_size="8KB")
    return ModelSource(AutoConfig.from_pretrained(folder), folder, seed=5, trust_remote_code=False)


def shapes_of(source: ModelSource) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(source.skeleton(torch.float32, "eager", CPU))


def whole(source: ModelSource) -> dict[str, torch.Tensor]:
    reader = source.initial_weights(CPU)
    tensors = {}
    for name in reader.names:
        flat = torch.full((torch.Size(reader.shape(name)).numel(),), float("nan"))
        reader.read_into("fp32", name, 0, flat)
        tensors[name] = flat.reshape(reader.shape(name))
    return tensors


def exact_mean(tensor: torch.Tensor) -> np.ndarray:
    """The mean over rows without any rounding but the last one, to float32."""
    columns = tensor.reshape(len(tensor), -1).T.tolist()
    means = [sum(map(Fraction, column), Fraction(0)) / len(column) for column in columns]
    return np.array([np.float32(float(mean)) for mean in means])


@given(st.integers(1, 300_000), st.integers(1, 300_000), st.none() | st.integers(1, 512))
def test_rows_are_enough_never_fewer_and_the_next_multiple(
    tokenizer_size: int, rows: int, multiple: int | None
) -> None:
    needed = rows_needed(tokenizer_size, rows, multiple)
    least = max(tokenizer_size, rows)
    assert least <= needed < least + (multiple or 1)
    assert needed % (multiple or 1) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("new_rows", ["mean", "random"])
def test_old_rows_are_the_folders_and_shapes_are_those_of_transformers(
    family: str, new_rows: str, tmp_path: Path
) -> None:
    source = saved(family, tmp_path)
    grown = source.resized(128, new_rows)
    assert (grown.vocabulary_size, source.vocabulary_size) == (128, OLD_ROWS)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs.resize_token_embeddings(128, mean_resizing=False)
    assert shapes_of(grown) == {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    assert grown.initial_weights(CPU).has("fp32") and not grown.initial_weights(CPU).has("exp_avg")
    before, after = whole(source), whole(grown)
    assert list(before) == list(after)
    num_grown = 0
    for name, tensor in after.items():
        assert torch.equal(tensor[: len(before[name])], before[name]), name
        assert tensor.isfinite().all(), name
        num_grown += len(tensor) != len(before[name])
    assert num_grown == {"llama_tied": 1, "gpt2": 1, "gemma2": 1, "phi": 3}.get(family, 2)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("family", ["llama", "llama_tied", "phi"])
def test_new_rows_are_the_exact_mean_of_the_old_ones(family: str, dtype: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", 7 * 32)
    source = saved(family, tmp_path, DTYPES[dtype])
    before, after = whole(source), whole(source.resized(101, "mean"))
    for name in (name for name in after if after[name].shape != before[name].shape):
        expected = exact_mean(before[name])
        for row in after[name][OLD_ROWS:]:
            assert np.array_equal(row.reshape(-1).numpy(), expected), name


class Held:
    """A range reader over one tensor in memory."""

    optimizer_step = 0
    missed_steps = NONE_MISSED
    names = ("table",)

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.table.shape)

    def has(self, kind: str) -> bool:
        return kind == "fp32"

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self.table.reshape(-1)[start : start + out.numel()])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 200), st.integers(0, 99), st.booleans())
def test_a_mean_is_exact_for_any_chunk(rows: int, width: int, chunk: int, seed: int, cancels: bool) -> None:
    """Numbers of 20 bits and 20 more of range, whose float64 sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-(2**20), 2**20, (rows, width), generator=generator)
    table = numbers * 2.0 ** torch.randint(-10, 10, (rows, 1), generator=generator)
    table = torch.cat([table, -table, torch.ones(1, width)]) if cancels else table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "CHUNK_ELEMENTS", chunk)
        assert np.array_equal(mean_row(Held(table), "table").numpy(), exact_mean(table))


def test_a_mean_takes_little_memory_and_never_the_whole_table() -> None:
    largest = 0

    class Watched(Held):
        def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
            nonlocal largest
            largest = max(largest, out.numel())
            super().read_into(kind, name, start, out)

    mean_row(Watched(torch.ones(1, 8).expand(1_000_000, 8)), "table")
    assert largest <= vocabulary.CHUNK_ELEMENTS


@pytest.fixture(scope="module")
def grown_sources(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[ModelSource, dict[str, torch.Tensor]]]:
    sources = []
    for family in ("llama", "llama_tied", "phi"):
        source = saved(family, tmp_path_factory.mktemp(family))
        sources += [source.resized(rows, kind) for rows, kind in ((98, "random"), (128, "mean"), (128, "random"))]
    return [(source, whole(source)) for source in sources]


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_any_slice_is_that_slice_of_the_whole(grown_sources, data: st.DataObject) -> None:
    source, expected = data.draw(st.sampled_from(grown_sources))
    reader = source.initial_weights(CPU)
    name = data.draw(st.sampled_from([name for name in reader.names if source.vocabulary_size in reader.shape(name)]))
    flat = expected[name].reshape(-1)
    for _ in range(4):
        start = data.draw(st.integers(0, flat.numel()))
        count = data.draw(st.integers(0, flat.numel() - start))
        out = torch.full((count,), float("nan"), dtype=data.draw(st.sampled_from([torch.float32, torch.float64])))
        reader.read_into("fp32", name, start, out)
        assert torch.equal(out.float(), flat[start : start + count])


def test_a_slice_that_cuts_old_and_new_rows_anywhere(grown_sources) -> None:
    for source, expected in grown_sources:
        reader = source.initial_weights(CPU)
        for name in [name for name in reader.names if source.vocabulary_size in reader.shape(name)]:
            flat, width = expected[name].reshape(-1), expected[name][0].numel()
            for start in (flat.numel() - 2 * width - width // 2, flat.numel() - width // 3, 90 * width + 1):
                out = torch.full((flat.numel() - start - width // 4,), float("nan"))
                reader.read_into("fp32", name, start, out)
                assert torch.equal(out, flat[start : start + len(out)])


def test_random_rows_are_the_models_size_and_depend_on_seed_name_and_row() -> None:
    shapes = {"embedding": (40_000, 64), "head": (40_000, 64), "bias": (40_000,)}
    make, other_seed = random_rows(5, 0.02, shapes), random_rows(6, 0.02, shapes)
    table = torch.stack([make("embedding", row) for row in range(2000)])
    assert table.dtype == torch.float32
    assert table.std().item() == pytest.approx(0.02, rel=0.01) and abs(table.mean().item()) < 2e-4
    assert len(table.unique(dim=0)) == len(table)
    assert torch.equal(make("embedding", 7), random_rows(5, 0.02, shapes)("embedding", 7))
    assert not torch.equal(make("embedding", 7), make("head", 7))
    assert not torch.equal(make("embedding", 7), other_seed("embedding", 7))
    assert torch.equal(make("bias", 7).reshape(-1), torch.zeros(1))


def test_random_rows_without_a_size_in_the_config_are_refused() -> None:
    config = AutoConfig.for_model("rwkv", vocab_size=OLD_ROWS, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"has no initializer_range.*--new_token_init mean"):
        grown_weights(
            Held(torch.ones(OLD_ROWS, 32)), build_skeleton(config, torch.float32, "eager", CPU, False), 5, "random"
        )


@pytest.mark.parametrize("stored", ["once", "twice", "head alone"])
def test_a_tied_head_may_be_stored_in_any_way(stored: str, tmp_path: Path) -> None:
    tiny_model("llama_tied").save_pretrained(tmp_path)
    file, embedding, head = tmp_path / "model.safetensors", "model.embed_tokens.weight", "lm_head.weight"
    tensors = load_file(file)
    expected = tensors[embedding].clone()
    if stored != "once":
        tensors[head] = expected.clone()
    if stored == "head alone":
        del tensors[embedding]
    save_file(tensors, file, metadata={"format": "pt"})
    source = ModelSource(AutoConfig.from_pretrained(tmp_path), tmp_path, 5, False).resized(100, "mean")
    assert tied_names(source.skeleton(torch.float32, "eager", CPU)) == {head: embedding}
    assert torch.equal(whole(source)[embedding][:OLD_ROWS], expected)


def test_nothing_changes_where_nothing_grows(tmp_path: Path) -> None:
    source = saved("llama", tmp_path)
    assert source.resized(OLD_ROWS, "random") is source
    grown = source.resized(128, "random")
    assert grown.resized(OLD_ROWS, "mean") is source
    assert grown.resized(100, "mean").vocabulary_size == 100
    assert torch.equal(
        whole(grown.resized(100, "mean"))["lm_head.weight"], whole(source.resized(100, "mean"))["lm_head.weight"]
    )
    assert source.hf_config.vocab_size == OLD_ROWS


def test_random_weights_get_the_larger_shape_and_their_own_values(tmp_path: Path) -> None:
    source = ModelSource(CONFIGS["phi"], None, 5, False).resized(128, "mean")
    tensors = whole(source)
    assert tensors["lm_head.weight"].shape == (128, 32) and tensors["lm_head.bias"].shape == (128,)
    assert tensors["lm_head.weight"][OLD_ROWS:].std().item() == pytest.approx(0.02, rel=0.2)


def test_the_size_is_changed_in_every_place_of_a_config() -> None:
    config = Gemma3Config(text_config={"vocab_size": OLD_ROWS, "num_hidden_layers": 1})
    changed = with_vocabulary_size(config, 128)
    assert config.get_text_config().vocab_size == OLD_ROWS
    assert changed.to_dict()["text_config"]["vocab_size"] == 128


def refusal(config: PretrainedConfig) -> str:
    with pytest.raises(InputError) as caught:
        ModelSource(config, Path("unread"), 5, False).resized(128, "mean")
    return str(caught.value)


class SecondTableConfig(LlamaConfig):
    model_type = "llama_with_a_second_table"


class SecondTable(LlamaForCausalLM):
    config_class = SecondTableConfig

    def __init__(self, config: SecondTableConfig) -> None:
        super().__init__(config)
        self.further = nn.Linear(config.vocab_size, 3)


def test_a_model_in_which_another_tensor_follows_from_the_vocabulary_is_refused() -> None:
    AutoModelForCausalLM.register(SecondTableConfig, SecondTable, exist_ok=True)
    config = SecondTableConfig(**CONFIGS["llama"].to_diff_dict())
    assert "further.weight has a shape that follows from vocab_size" in refusal(config)


def test_per_layer_embeddings_of_their_own_size_are_refused() -> None:
    config = Gemma3nTextConfig(
        vocab_size=OLD_ROWS,
        vocab_size_per_layer_input=90,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=[48],
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["full_attention"],
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0],
    )
    message = refusal(config)
    assert "model.embed_tokens_per_layer.weight has a shape that follows from vocab_size_per_layer_input" in message


def test_an_embedding_with_rows_beside_the_vocabulary_is_refused() -> None:
    config = AutoConfig.for_model("cpmant", vocab_size=OLD_ROWS, hidden_size=32, num_hidden_layers=1, prompt_length=2)
    assert f"rows in their embedding for a vocab_size of {OLD_ROWS}" in refusal(config)


def test_a_grown_model_computes_what_it_did_on_old_tokens(tmp_path: Path) -> None:
    source = saved("phi", tmp_path).resized(128, "mean")
    model: Any = AutoModelForCausalLM.from_config(source.config_copy(), dtype=torch.float32, attn_implementation="sdpa")
    model.load_state_dict(whole(source), strict=False)
    input_ids = torch.arange(12)[None]
    before, after = tiny_model("phi")(input_ids).logits, model.eval()(input_ids).logits
    assert after.shape[-1] == 128
    torch.testing.assert_close(after[..., :OLD_ROWS], before, rtol=1e-5, atol=1e-6)
    assert json.loads(source.config_copy().to_json_string())["vocab_size"] == 128
    assert copy.deepcopy(source).vocabulary_size == 128
