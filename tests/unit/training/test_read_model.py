"""What can be refused without the data is refused before any of it is read."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from ds_recipes.config.load import load_config
from ds_recipes.errors import ConfigError, DsRecipesError, InputError
from ds_recipes.training.inputs import Model, read_model
from ds_recipes.world.group import solo
from tests.nano import make_nano

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


def read(nano: Path, *flags: str) -> Model:
    """Read the model of a run whose data would end any attempt to read them."""
    needed = ["--config", str(nano), "--save_checkpoint_path", str(nano.parent / "run"), "--train_data", "gone.jsonl"]
    return read_model(load_config([*needed, *flags], env={}), solo(), None)


def of_type(nano: Path, model_type: str, *flags: str, **settings: object) -> Model:
    """The same of a model of some type with random weights, and the tokenizer of `nano`."""
    chosen = {name: value for name, value in {**SMALL, "eos_token_id": 1, **settings}.items() if value is not None}
    path = nano.parent / f"{model_type}.json"
    path.write_text(json.dumps(AutoConfig.for_model(model_type, **chosen).to_dict(), default=str))
    run_file = nano.with_name(f"{model_type}.yaml")
    run_file.write_text("".join(line for line in nano.open() if not line.startswith("model_name")))
    return read(run_file, "--model_config", str(path), "--tokenizer_name", str(nano.parent / "model"), *flags)


def test_a_model_that_can_be_trained_is_read_without_any_data(nano: Path) -> None:
    assert read(nano).notes == ()
    assert of_type(nano, "llama").notes == ()


@pytest.mark.parametrize("model_type", ["hrm_text", "lara_mini"])
def test_a_model_that_could_not_be_exported_is_not_begun(nano: Path, model_type: str) -> None:
    with pytest.raises(InputError, match=r"mix several parameters.*could become a Hugging Face model"):
        of_type(nano, model_type)


def test_attention_that_cannot_run_here_is_refused(nano: Path) -> None:
    with pytest.raises(ConfigError, match="--attn_implementation flash_attention_2 needs a GPU"):
        read(nano, "--attn_implementation", "flash_attention_2")


@pytest.mark.parametrize("model_type", ["gemma2", "llama"])
def test_a_vocabulary_that_does_not_hold_the_tokenizer_is_refused(nano: Path, model_type: str) -> None:
    with pytest.raises(DsRecipesError, match="rows"):
        of_type(nano, model_type, "--attn_implementation", "eager", vocab_size=1)


def test_a_model_without_a_limit_of_positions_takes_any_context(nano: Path) -> None:
    model = of_type(
        nano,
        "xlnet",
        "--context_size",
        "512",
        "--attn_implementation",
        "eager",
        max_position_embeddings=None,
        head_dim=None,
        d_head=16,
    )
    assert model.source.hf_config.max_position_embeddings == -1
