"""tools/convert_to_hf.py as a user starts it: our checkpoints, DeepSpeed's, one state_dict, a whole run, by mpirun."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from benchmarks.export import write_zero3
from ds_recipes.checkpoint.export.run import choose, export_all
from ds_recipes.checkpoint.export.sources import open_source
from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.errors import CheckpointError, InputError
from tests.e2e.launchers import ROOT, Ended, command, run
from tests.nano import make_nano
from tests.unit.checkpoint.flat_engine import FlatEngine, save

TOOL = ROOT / "tools" / "convert_to_hf.py"
STEPS = (200, 400, 600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/: a base model with a tokenizer; run/: checkpoints of ours, of other weights each; model.pt, zero/."""
    folder = tmp_path_factory.mktemp("convert")
    make_nano(folder)
    files = {path.name: path.read_bytes() for path in (folder / "model").iterdir() if path.suffix == ".json"}
    for step in STEPS:
        model = trained(folder, step)
        ids = torch.arange(9)[None]
        with torch.inference_mode():
            probe = (ids, model(ids).logits)
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        save(folder / "run", step, FlatEngine(tensors), files=files, probe=probe)
    state = {f"module.{name}": tensor for name, tensor in trained(folder, 200).state_dict().items()}
    torch.save(state | {"module.model.rotary_emb.inv_freq": torch.ones(5)}, folder / "model.pt")
    return folder


def trained(folder: Path, seed: int) -> Any:
    """The base model with other weights."""
    model: Any = LlamaForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def convert(*words: str | Path, ranks: int = 1, **env: str) -> Ended:
    launcher = "mpirun" if ranks > 1 else "python"
    return run(command(launcher, ranks, TOOL, *map(str, words)), env=env)


def assert_holds(out: Path, model: Any) -> None:
    """Exactly the model's parameters, as float32."""
    tensors = load_file(out / "model.safetensors")
    expected = dict(model.named_parameters())
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert (out / "README.md").exists() and (out / "tokenizer.json").exists()


@pytest.mark.slow
def test_the_ranks_of_mpirun_share_the_checkpoints_of_a_run(folder: Path, tmp_path: Path) -> None:
    chosen = ("--start", "200", "--end", "600", "--increment", "400")
    ended = convert("--run", folder / "run", *chosen, "--out", tmp_path / "hf", ranks=2)
    assert ended.status == 0, ended.output
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["iter_0000200", "iter_0000600"]
    for step in (200, 600):
        assert_holds(tmp_path / "hf" / f"iter_{step:07d}", trained(folder, step))
    assert ended.output.count("differ from the checkpoint's by 0 at most") == 2, ended.output
    with pytest.raises(InputError, match=r"iter_0000200 exists already.* Nothing was exported"):
        export_all(choose(folder / "run", None, None, None), tmp_path / "hf", Wanted(), 1, lambda row: None)


def test_what_befalls_one_checkpoint_of_a_run_leaves_the_others_alone(folder: Path, tmp_path: Path) -> None:
    """One is damaged, and the process of another is killed while it writes."""
    copied = tmp_path / "run"
    shutil.copytree(folder / "run", copied)
    (rank_file,) = (copied / "iter_0000400").glob("rank-*")
    rank_file.write_bytes(rank_file.read_bytes()[:-1])
    faults = {"FAULT_TEST": "1", "DS_RECIPES_FAULTS": "kill@3 path=*hf/.iter_0000200.partial*"}
    given = ("--run", copied, "--out", tmp_path / "hf", "--jobs", "2", "--no_load_check", "--dtype", "bfloat16")
    ended = convert(*given, **faults)
    assert ended.status == 1, ended.output
    assert f"iter_0000400  FAILED: {copied / 'iter_0000400'}: {rank_file.name} has" in ended.output, ended.output
    assert "iter_0000200  FAILED: its process was killed by signal 9" in ended.output, ended.output
    assert "1 of 3 checkpoints exported" in ended.output, ended.output
    left = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert left[0].startswith(".iter_0000200.partial-") and left[1:] == ["iter_0000600"], left


def test_a_killed_rank_fails_the_launch(folder: Path, tmp_path: Path) -> None:
    faults = {"FAULT_TEST": "1", "DS_RECIPES_FAULTS": "kill@3 path=*.partial*"}
    ended = convert("--ckpt", folder / "run" / "iter_0000200", "--out", tmp_path / "hf", ranks=2, **faults)
    assert ended.status != 0 and not (tmp_path / "hf").exists(), ended.output


def test_one_state_dict_becomes_a_model_with_the_ancestors_flags(folder: Path, tmp_path: Path) -> None:
    """By mpirun, of which rank 0 works and the others say nothing; names of a wrapper and frequencies of old are known."""
    out = tmp_path / "hf"
    ended = convert("--model", folder / "model", "--ckpt", folder / "model.pt", "--out", out, ranks=2)
    assert ended.status == 0, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.strip()]
    assert line.startswith(f"{out}: ") and "loads with plain transformers" in line, line
    assert_holds(out, trained(folder, 200))


def test_deepspeeds_folder_becomes_a_model(folder: Path, tmp_path: Path) -> None:
    """With the config beside it, as the Trainer lays it, and a vocabulary that has grown since."""
    model = trained(folder, 400)
    model.resize_token_embeddings(model.config.vocab_size + 5)
    shutil.copytree(folder / "model", tmp_path / "zero")
    values = [parameter.detach().reshape(-1) for parameter in model.parameters()]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    write_zero3(tmp_path / "zero" / "global_step400", shapes, values.__getitem__)
    ended = convert("--ckpt", tmp_path / "zero" / "global_step400", "--out", tmp_path / "hf")
    assert ended.status == 0, ended.output
    assert "loads with plain transformers; its logits differ from the checkpoint's by" in ended.output
    assert f"has {model.config.vocab_size:,} rows in its vocabulary" in ended.output
    assert_holds(tmp_path / "hf", model)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == model.config.vocab_size


def test_what_cannot_be_exported_is_named(folder: Path, tmp_path: Path) -> None:
    """Without a start of Python each: what the tool calls first."""
    wanted = Wanted(model=str(folder / "model"))
    for path, said in (
        (folder / "run", "pass the folder with --run"),
        (folder / "model", "nothing in it can be exported"),
        (tmp_path / "absent", "there is no such checkpoint"),
    ):
        with pytest.raises(InputError, match=said):
            open_source(path, wanted)
    shutil.copy(folder / "model.pt", tmp_path)
    with pytest.raises(InputError, match=r"no config\.json lies with it"):
        open_source(tmp_path / "model.pt", Wanted())
    with pytest.raises(InputError, match=r"--model .*: there is no such folder"):
        open_source(tmp_path / "model.pt", Wanted(model=str(tmp_path / "absent")))
    for lora in ("merge", "adapter"):
        with pytest.raises(InputError, match="has no LoRA adapters"):
            open_source(tmp_path / "model.pt", Wanted(lora=lora))
    state = torch.load(tmp_path / "model.pt")
    name = "module.model.layers.1.mlp.up_proj.weight"
    for changed, said in (
        ({**state, "module.value_head.weight": torch.ones(3)}, r"value_head\.weight: no parameter of the model"),
        ({**state, name: state[name][:-1]}, r"up_proj\.weight: \[50, 40\], the model has \[51, 40\]"),
        ({key: value for key, value in state.items() if key != name}, r"up_proj\.weight: absent"),
    ):
        torch.save(changed, tmp_path / "changed.pt")
        with pytest.raises(CheckpointError, match=said):
            open_source(tmp_path / "changed.pt", wanted)


@pytest.mark.parametrize(
    "name", ["model.pt", "rank-00000-of-00001.safetensors", "manifest.json", "global_step200/x.pt"]
)
def test_a_file_within_a_checkpoint_of_ours_is_not_the_checkpoint(name: str, folder: Path) -> None:
    checkpoint = folder / "run" / "iter_0000200"
    with pytest.raises(InputError, match=rf"Pass the checkpoint's folder: --ckpt {checkpoint}$"):
        open_source(checkpoint / name, Wanted(model=str(folder / "model")))


def test_tied_weights_that_were_trained_apart_are_refused(tmp_path: Path) -> None:
    make_nano(tmp_path, tied=True)
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = Wanted(model=str(tmp_path / "model"))
    torch.save(state, tmp_path / "equal.pt")
    assert "lm_head.weight" not in open_source(tmp_path / "equal.pt", wanted).reader.names
    only = {name: tensor for name, tensor in state.items() if name != "model.embed_tokens.weight"}
    torch.save(only, tmp_path / "only.pt")
    assert open_source(tmp_path / "only.pt", wanted).reader.names
    state["lm_head.weight"][-1, -1] += 1
    torch.save(state, tmp_path / "apart.pt")
    with pytest.raises(CheckpointError, match=r"ties .* but they differ"):
        open_source(tmp_path / "apart.pt", wanted)
