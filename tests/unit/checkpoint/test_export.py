"""An exported folder is what transformers itself would have saved, and computes what was trained."""

import copy
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ds_recipes.checkpoint.export.ahead import ahead
from ds_recipes.checkpoint.export.check import TOLERANCE
from ds_recipes.checkpoint.export.fresh_load import compare
from ds_recipes.checkpoint.export.pieces import plan_pieces
from ds_recipes.checkpoint.export.run import choose
from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.weights import DTYPES
from ds_recipes.checkpoint.export.whole import export
from ds_recipes.errors import CheckpointError, InputError
from ds_recipes.models.skeleton import build_skeleton, parameter_shapes
from tests.nano import make_nano
from tests.unit.checkpoint.export_material import checkpoint_of
from tests.unit.models.tiny import CONFIGS, WITH_BUFFERS, tiny_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_nano(folder)
    return {path.name: path.read_bytes() for path in (folder / "model").glob("tokenizer*")}


def tiny_skeleton(family: str) -> PreTrainedModel:
    return build_skeleton(copy.deepcopy(CONFIGS[family]), torch.float32, "eager", torch.device("cpu"), False)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", [*sorted(CONFIGS), *WITH_BUFFERS])
def test_the_tensors_are_those_that_transformers_saves(family: str, tmp_path: Path) -> None:
    """Names, shapes and values, for models whose tensors are renamed, transposed, tied or fused on loading too."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "theirs")
    export(checkpoint_of(model, tmp_path, {}), tmp_path / "ours", Wanted(load_check=False))
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "gemma4_text", "minimax_m2", "lfm2_moe"])
def test_each_tensor_has_the_dtype_that_transformers_keeps_it_in(family: str, tmp_path: Path) -> None:
    """Routers and their biases in float32 in a model of bfloat16, for example."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "theirs")
    export(checkpoint_of(model, tmp_path, {}), tmp_path / "ours", Wanted(dtype="bfloat16", load_check=False))
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert {name: tensor.dtype for name, tensor in ours.items()} == {n: tensor.dtype for n, tensor in theirs.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_buffers_load_afresh_and_another_program_may_keep_them_among_the_parameters(
    tmp_path: Path, tokenizer_files: dict[str, bytes]
) -> None:
    model = tiny_model("deepseek_v3")
    made = export(checkpoint_of(model, tmp_path, tokenizer_files), tmp_path / "hf", Wanted())
    assert made.difference == pytest.approx(0, abs=1e-5)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = export(tmp_path / "model.pt", tmp_path / "again", Wanted(model=str(tmp_path / "hf")))
    assert again.difference == pytest.approx(0, abs=1e-5)
    first, second = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()
    lacking = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_bias")}
    torch.save(lacking, tmp_path / "lacking.pt")
    with pytest.raises(CheckpointError, match="e_score_correction_bias: absent"):
        export(tmp_path / "lacking.pt", tmp_path / "never", Wanted(model=str(tmp_path / "hf")))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mixtral"])
def test_in_several_files_and_half_the_bytes_it_loads_afresh(
    family: str, tmp_path: Path, tokenizer_files: dict[str, bytes]
) -> None:
    model = tiny_model(family)
    made = export(
        checkpoint_of(model, tmp_path, tokenizer_files),
        tmp_path / "hf",
        Wanted(dtype="bfloat16", max_shard_bytes=9_000),
    )
    assert made.difference is not None and made.difference > 0
    assert len(made.files) > 2 and (tmp_path / "hf" / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.dtype == torch.bfloat16
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16()), name


def test_tensors_are_read_in_stretches_where_transformers_only_splits(tmp_path: Path) -> None:
    """Experts are fused in memory and apart in files: no expert needs the whole fused tensor, and the reading is in order."""
    skeleton = tiny_skeleton("mixtral")
    pieces = plan_pieces(skeleton, parameter_shapes(skeleton))
    assert all(piece.runs is not None for piece in pieces)
    for _, group in itertools.groupby(pieces, key=lambda piece: piece.source):
        covered = [run for piece in group for run in piece.runs or ()]
        assert all(one[0] + one[1] == other[0] for one, other in itertools.pairwise(covered))


def test_it_loads_where_ds_recipes_cannot_be_imported(tmp_path: Path, tokenizer_files: dict[str, bytes]) -> None:
    out = tmp_path / "hf"
    assert export(checkpoint_of(tiny_model("llama"), tmp_path, tokenizer_files), out).difference == 0
    program = (
        "import sys; sys.modules['ds_recipes'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        f"ids = AutoTokenizer.from_pretrained({str(out)!r})('x', return_tensors='pt').input_ids\n"
        "print(model.generate(ids % 97, max_new_tokens=3, min_new_tokens=3).shape[1] - ids.shape[1])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
UNLIKE = {
    "granitemoehybrid": {**SMALL, "layer_types": ["linear_attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 16},
    "jamba": {**SMALL, "attn_layer_period": 8, "attn_layer_offset": 4, "num_experts": 2},
    "mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "openai-gpt": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "modernbert-decoder": {**SMALL, "intermediate_size": 48, "cls_token_id": 1, "sep_token_id": 2},
    "llama": {**SMALL, "intermediate_size": 48},
}
"""Layers that are all recurrent, for which transformers makes a cache that its own forward then fails at; a forward that takes
no `use_cache`; a head of the name `decoder`; attention."""


@pytest.mark.parametrize("family", UNLIKE)
def test_models_of_unlike_forwards_load_and_are_compared(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **UNLIKE[family], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "hf")
    input_ids = torch.arange(16)[None]
    with torch.no_grad():
        logits = model(input_ids, **({} if family == "openai-gpt" else {"use_cache": False})).logits
    save_file({"input_ids": input_ids, "logits": logits}, tmp_path / "probe.safetensors")
    request = {"folder": tmp_path / "hf", "dtype": "float32", "trust_remote_code": False, "tokenizer": None}
    seen = compare(request | {"probe": tmp_path / "probe.safetensors"})
    assert seen["difference"] == 0.0 and seen["largest_logit"] == logits.abs().max()


def test_a_model_that_computes_something_else_is_not_published(
    tmp_path: Path, tokenizer_files: dict[str, bytes]
) -> None:
    checkpoint = checkpoint_of(tiny_model("llama"), tmp_path, tokenizer_files, damage=0.01)
    with pytest.raises(CheckpointError, match="does not compute what was trained"):
        export(checkpoint, tmp_path / "hf")
    assert not list(tmp_path.glob("*hf*")) and not list(tmp_path.glob(".hf*"))


def test_a_folder_that_plain_transformers_cannot_load_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not load with plain transformers"):
        export(checkpoint_of(tiny_model("llama"), tmp_path, {"tokenizer.json": b"{}"}), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_the_card_tells_where_the_model_comes_from_and_no_path(tmp_path: Path) -> None:
    state = {"step": 600, "tokens": 1_234_567, "data_files": [["/secret/place/train.jsonl", "abc1"]]}
    state |= {"environment": {"torch": "2.13.0", "hosts": "secrethost"}, "evaluation": {"eval_loss": 1.25}}
    run = {
        "model_name": "/secret/models/base-7b",
        "lr": 1e-4,
        "context_size": 2048,
        "train_data": ["/secret/place/train.jsonl"],
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump(run))
    checkpoint = checkpoint_of(tiny_model("llama"), tmp_path, {}, state=state)
    export(checkpoint, tmp_path / "hf", Wanted(load_check=False))
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert card.data.license is None and card.data.language is None
    for shown in (
        "base-7b",
        "1,234,567",
        "| Optimizer steps | 600 |",
        "train.jsonl (abc1)",
        "`lr` | 0.0001",
        "torch 2.13.0",
        "1.2500",
        "iter_0000001",
    ):
        assert shown in card.text, shown
    assert "secret" not in card.content
    run["model_name"] = "owner/base-7b"
    (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump(run))
    export(checkpoint, tmp_path / "hf2", Wanted(load_check=False))
    assert ModelCard.load(tmp_path / "hf2" / "README.md").data.base_model == "owner/base-7b"


def test_memory_is_bounded_by_a_few_buffers_within_one_large_tensor(tmp_path: Path) -> None:
    """One tensor has 240 MB, the model 250; 40 MB more than what the imports took must do."""
    program = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.whole import export
from tests.unit.checkpoint.flat_engine import FlatEngine, save
config = LlamaConfig(vocab_size=60_000, hidden_size=1000, intermediate_size=100, num_hidden_layers=1, num_attention_heads=10)
config.tie_word_embeddings = True
model = LlamaForCausalLM(config)
files = {{"config.json": config.to_json_string().encode()}}
tensors = {{name: p.detach() for name, p in model.named_parameters()}}
path = save(Path({str(tmp_path)!r}) / "run", 1, FlatEngine(tensors, with_moments=False), files=files)
del model, tensors
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024
peak, done, before = 0, False, anonymous()
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous()); time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
for dtype in ("float32", "bfloat16"):
    export(path, Path({str(tmp_path)!r}) / dtype, Wanted(load_check=False, dtype=dtype))
done = True; thread.join()
print(peak - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    used = int(done.stdout.split()[-1])
    assert used < 40_000_000, f"{used / 1e6:.0f} MB"


def test_an_adapter_has_the_files_of_peft(tmp_path: Path) -> None:
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    low, high = torch.randn(4, 32), torch.randn(32, 4)
    state = {f"{layer}.lora_A.default.weight": low, f"{layer}.lora_B.default.weight": high}
    torch.save(state | {f"{layer}.base_layer.weight": torch.ones(32, 32)}, tmp_path / "model.pt")
    settings = {
        "peft_type": "LORA",
        "lora_alpha": 8,
        "r": 4,
        "base_model_name_or_path": "somewhere",
        "inference_mode": False,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    made = export(
        tmp_path / "model.pt", tmp_path / "adapter", Wanted(model="owner/base", lora="adapter", dtype="bfloat16")
    )
    assert made.files == ("adapter_model.safetensors",) and made.difference is None
    expected = {f"{layer}.lora_A.weight": low.bfloat16(), f"{layer}.lora_B.weight": high.bfloat16()}
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config == settings | {"base_model_name_or_path": "owner/base", "inference_mode": True}
    with pytest.raises(InputError, match="--lora merge or --lora adapter"):
        export(tmp_path / "model.pt", tmp_path / "plain", Wanted(model="owner/base"))


def test_an_error_of_the_reading_thread_arrives_and_the_thread_ends() -> None:
    def pieces() -> Iterator[bytes]:
        yield b"a"
        raise ValueError("no more")

    before = threading.active_count()
    with pytest.raises(ValueError, match="no more"):
        list(ahead(pieces()))
    endless = ahead(itertools.repeat(b"a"))
    assert next(endless) == b"a"
    endless.close()
    assert threading.active_count() == before


def test_steps_of_a_run_are_chosen(tmp_path: Path) -> None:
    for name in (
        "iter_0000200",
        "iter_0000400",
        "iter_0000600",
        ".iter_0000800.partial-1",
        "iter_0000300.aside-1",
        "hf",
    ):
        (tmp_path / name).mkdir()

    def steps(*asked: int | None) -> list[int]:
        return [int(path.name.removeprefix("iter_")) for path in choose(tmp_path, *asked)]

    assert steps(None, None, None) == [200, 400, 600]
    assert steps(300, None, None) == [400, 600] and steps(None, 400, None) == [200, 400]
    assert steps(200, 600, 400) == [200, 600]
    with pytest.raises(InputError, match="no checkpoint of step 300; there are 200, 400, 600"):
        steps(200, 400, 100)
    with pytest.raises(InputError, match="none of its checkpoints"):
        steps(700, None, None)
    with pytest.raises(InputError, match="holds no checkpoints"):
        choose(tmp_path / "hf", None, None, None)


def test_sizes_are_written_as_transformers_writes_them() -> None:
    from tools.convert_to_hf import size_in_bytes

    assert [size_in_bytes(text) for text in ("5GB", "500MB", "1 kb")] == [5 * 10**9, 500 * 10**6, 1000]


def test_tolerances_cover_all_precisions() -> None:
    assert TOLERANCE.keys() == DTYPES.keys()
