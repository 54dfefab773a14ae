"""An exported folder is what transformers itself would have saved, and computes what was trained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from ds_recipes.checkpoint import export as exporting
from ds_recipes.checkpoint.export import export
from ds_recipes.errors import CheckpointError, InputError
from tests.nano import make_nano
from tests.unit.checkpoint.flat_engine import FlatEngine, save
from tests.unit.models.tiny import CONFIGS, tiny_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_nano(folder)
    return {path.name: path.read_bytes() for path in (folder / "model").glob("tokenizer*")}


def checkpoint_of(model: PreTrainedModel, folder: Path, files: dict[str, bytes], damage: float = 0.0) -> Path:
    """A checkpoint of a whole model, with the logits that it computes itself."""
    model.config.save_pretrained(folder / "config")
    model.generation_config.save_pretrained(folder / "config")
    small = {path.name: path.read_bytes() for path in (folder / "config").iterdir()}
    small["config.json"] = json.dumps(
        json.loads(small["config.json"]) | {"architectures": [type(model).__name__]}
    ).encode()
    input_ids = torch.arange(8)[None]
    with torch.inference_mode():
        logits = model(input_ids).logits.float() + damage
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return save(folder / "run", 1, FlatEngine(tensors), files=small | files, probe=(input_ids, logits))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_tensors_are_those_that_transformers_saves(family: str, tmp_path: Path) -> None:
    """Names, shapes and values, for models whose tensors are renamed, transposed, tied or fused on loading too."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "theirs")
    export(checkpoint_of(model, tmp_path, {}), tmp_path / "ours", load_check=False)
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mixtral"])
def test_in_several_files_and_half_the_bytes_it_loads_afresh(
    family: str, tmp_path: Path, tokenizer_files: dict[str, bytes]
) -> None:
    model = tiny_model(family)
    made = export(
        checkpoint_of(model, tmp_path, tokenizer_files), tmp_path / "hf", dtype="bfloat16", max_shard_bytes=9_000
    )
    assert made.difference is not None and made.difference > 0
    assert len(made.files) > 2 and (tmp_path / "hf" / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.dtype == torch.bfloat16
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16()), name


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


def test_a_model_that_computes_something_else_is_not_published(
    tmp_path: Path, tokenizer_files: dict[str, bytes]
) -> None:
    checkpoint = checkpoint_of(tiny_model("llama"), tmp_path, tokenizer_files, damage=0.01)
    with pytest.raises(CheckpointError, match="does not compute what was trained"):
        export(checkpoint, tmp_path / "hf")
    assert not list(tmp_path.glob("*hf*")) and not list(tmp_path.glob(".hf*"))


def test_a_folder_that_plain_transformers_cannot_load_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not load with plain transformers"):
        export(checkpoint_of(tiny_model("llama"), tmp_path, {}), tmp_path / "hf")  # there is no tokenizer
    assert not (tmp_path / "hf").exists()


def test_a_damaged_checkpoint_and_a_full_folder_are_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tiny_model("llama"), tmp_path, {})
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").touch()
    with pytest.raises(InputError, match="exists already"):
        export(checkpoint, taken)
    file = checkpoint / "rank-00000-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-00000.*is damaged"):
        export(checkpoint, tmp_path / "hf")


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """One GB would be needed for all of it; a process that may have little more than the imports' own does it."""
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from ds_recipes.checkpoint.export import export
from tests.unit.checkpoint.flat_engine import FlatEngine, save
config = LlamaConfig(vocab_size=1000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6)
config.architectures = ["LlamaForCausalLM"]
with torch.device("meta"):
    shapes = {{name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}}
class Lazy(FlatEngine):
    def shards(self):
        for name, shape in shapes.items():
            self.tensors = {{name: torch.ones(shape)}}
            yield from FlatEngine.shards(self)
folder = Path({str(tmp_path)!r})
files = {{"config.json": config.to_json_string().encode()}}
path = save(folder / "run", 1, Lazy({{}}, with_moments=False), files=files)
def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024
import threading, time
peak, done, before = 0, False, anonymous()
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
export(path, folder / "hf", load_check=False); done = True; thread.join()
largest = max(4 * s.numel() for s in shapes.values())
print(sum(4 * s.numel() for s in shapes.values()), largest, peak - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    total, largest, used = map(int, done.stdout.split()[-3:])
    assert total > 20 * largest
    assert used < largest + 3 * 16_777_216 + 20_000_000, (
        f"{used / 1e6:.0f} MB for a largest tensor of {largest / 1e6:.0f}"
    )


def test_sizes_are_written_as_transformers_writes_them() -> None:
    from tools.convert_to_hf import size_in_bytes

    assert [size_in_bytes(text) for text in ("5GB", "500MB", "1 kb")] == [5 * 10**9, 500 * 10**6, 1000]


def test_tolerances_cover_all_precisions() -> None:
    assert exporting.TOLERANCE.keys() == exporting.DTYPES.keys()
