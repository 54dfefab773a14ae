"""DeepSpeed's own folders, made by DeepSpeed on real ranks, read as ranges: bit for bit what DeepSpeed reads."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.whole import export
from ds_recipes.checkpoint.native import is_deepspeed, open_deepspeed, with_adapters
from ds_recipes.errors import InputError
from ds_recipes.ranges import RangeReader
from tests.ranks.launch import run_ranks
from tests.ranks.other_trainers import PLAIN, train_with_each
from tests.ranks.plain_deepspeed import Plain, model_of, save_all, to_universal
from tests.ranks.training import train

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
ROUND_ROBIN = (("round_robin_gradients", True),)
ALIGNED = (("parameter_alignment", True),)
SUB_GROUPS = (("sub_group_size", 900),)
FLOAT32_SUMS = (("data_types", {"grad_accum_dtype": "fp32"}),)  # another optimizer class of DeepSpeed's
CASES: dict[int, tuple[Plain, ...]] = {
    1: (Plain(1), Plain(2, tied=True), Plain(3, bf16=True, groups=2)),
    2: (
        Plain(1, bf16=True, groups=2),
        Plain(1, frozen=True, steps=0),
        Plain(2, frozen=True, groups=3, zero=ROUND_ROBIN),
        Plain(2, bf16=True, groups=2, zero=ALIGNED),
        Plain(2, bf16=True, frozen=True, exclude_frozen=True),
        Plain(3, frozen=True, tied=True),
        Plain(3, bf16=True, frozen=True, exclude_frozen=True),
        Plain(3, groups=2, steps=0, zero=SUB_GROUPS),
        Plain(0),
    ),
    3: (
        Plain(1, tied=True),
        Plain(1, bf16=True, groups=2, top=FLOAT32_SUMS),
        Plain(2, bf16=True, groups=2),
        Plain(3, groups=2, zero=SUB_GROUPS),
    ),
}
EVERY = [pytest.param(ranks, plain, id=f"{ranks}-{plain}") for ranks, cases in CASES.items() for plain in cases]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Plain], Path]:
    """The folder of a case; all of one number of ranks are made in one launch."""

    @cache
    def home_of(ranks: int) -> Path:
        home = tmp_path_factory.mktemp(f"ranks{ranks}")
        run_ranks(save_all, ranks, str(home), CASES[ranks], timeout=120)
        return home

    return lambda ranks, plain: home_of(ranks) / str(plain)


def whole(reader: RangeReader, kind: str, name: str) -> torch.Tensor:
    """A tensor put together from odd pieces."""
    shape = reader.shape(name)
    flat = torch.empty(torch.Size(shape).numel())
    for start in range(0, flat.numel(), 7_001):
        reader.read_into(kind, name, start, flat[start : start + 7_001])
    return flat.reshape(shape)


@pytest.mark.parametrize(("ranks", "plain"), EVERY)
def test_weights_equal_what_deepspeed_reads(made: Any, ranks: int, plain: Plain) -> None:
    home = made(ranks, plain)
    reader = open_deepspeed(home)
    expected = torch.load(home / "expected.pt")
    if expected is not None:  # DeepSpeed reads neither stage 0 nor BF16_Optimizer
        ours = {name: whole(reader, "fp32", name) for name in (*reader.names, *reader.tied)}
        more = ours.keys() - expected.keys()
        assert more <= set(reader.frozen) and (plain.stage == 1 or not more), (
            "DeepSpeed leaves out what is frozen at stage 1"
        )
        assert expected.keys() <= ours.keys()
        for name, tensor in expected.items():
            assert torch.equal(ours[name], tensor), name
    assert bool(reader.tied) == plain.tied
    assert reader.step == plain.steps and reader.trained_in == ("bfloat16" if plain.bf16 else "float32")


# DeepSpeed 0.19 converts round_robin_gradients wrongly: parameters get each other's values.
CONVERTED = [one for one in EVERY if one.values[1].stage and one.values[1].steps and one.values[1].zero != ROUND_ROBIN]


@pytest.mark.parametrize(("ranks", "plain"), CONVERTED)
def test_moments_equal_deepspeeds_universal_form(made: Any, ranks: int, plain: Plain) -> None:
    home = made(ranks, plain)
    universal = to_universal(home)
    reader, converted = open_deepspeed(home), open_deepspeed(universal)
    assert reader.optimizer_step == converted.optimizer_step == plain.steps
    assert converted.names == reader.names and converted.tied == reader.tied
    for kind in KINDS:
        assert reader.has(kind) and converted.has(kind)
        for name in reader.names:
            ours = whole(reader, kind, name)
            assert torch.equal(whole(converted, kind, name), ours), name
            if name not in reader.frozen:
                theirs = torch.load(universal / "zero" / name / f"{kind}.pt")
                theirs = theirs["param"] if isinstance(theirs, dict) else theirs
                assert torch.equal(theirs.reshape(ours.shape).float(), ours), (kind, name)
            elif kind != "fp32":
                assert not ours.any(), "a frozen parameter has no moments"


def test_without_a_step_there_are_no_moments(made: Any) -> None:
    for plain in (Plain(1, frozen=True, steps=0), Plain(3, groups=2, steps=0, zero=SUB_GROUPS), Plain(0)):
        reader = open_deepspeed(made(2, plain))
        assert [reader.has(kind) for kind in KINDS] == [True, False, False]


def gone(folder: Path) -> None:
    next(folder.glob("*rank_1_*optim_states.pt")).unlink()


def last_gone(folder: Path) -> None:
    next(folder.glob("*rank_2_*optim_states.pt")).unlink()


def one_too_many(folder: Path) -> None:
    file = next(folder.glob("*rank_2_*optim_states.pt"))
    shutil.copy(file, folder / file.name.replace("rank_2", "rank_3"))


def of_two_saves(folder: Path) -> None:
    file = next(folder.glob("*rank_0_*optim_states.pt"))
    other = file.name.removeprefix("bf16_") if file.name.startswith("bf16_") else f"bf16_{file.name}"
    shutil.copy(file, folder / other)


def short(folder: Path) -> None:
    file = next(folder.glob("*rank_1_*optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-2000])


def no_model(folder: Path) -> None:
    for file in folder.glob("*model_states.pt"):
        file.unlink()


def no_optimizer(folder: Path) -> None:
    for file in folder.glob("*optim_states.pt"):
        file.unlink()


def out_of_the_folder(folder: Path) -> None:
    file = next(folder.glob("*rank_1_*optim_states.pt"))
    file.rename(folder.parent / "elsewhere.pt")
    file.symlink_to(folder.parent / "elsewhere.pt")


def empty_pointer(folder: Path) -> None:
    (folder.parent / "latest").write_text("\n")


def escaping_pointer(folder: Path) -> None:
    (folder.parent / "latest").write_text(f"../{folder.parent.name}/{folder.name}")


def no_pointer(folder: Path) -> None:
    (folder.parent / "latest").unlink()


def stale_pointer(folder: Path) -> None:
    (folder.parent / "latest").write_text("global_step9")


def experts(folder: Path) -> None:
    (folder / "layer_0_expert_1_mp_rank_00_model_states.pt").touch()


def tensor_parallel(folder: Path) -> None:
    (folder / "mp_rank_01_model_states.pt").touch()


def other_values(folder: Path) -> None:
    """The optimizer's files of another model."""
    for file in folder.glob("*_optim_states.pt"):
        content = torch.load(file, weights_only=False)
        state = content["optimizer_state_dict"]
        key = "fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"
        state[key] = [flat[:-30].clone() for flat in state[key]]
        torch.save(content, file)


DAMAGE: dict[Callable[[Path], None], str] = {
    gone: r"file of rank 1 is missing.*rank_1",
    last_gone: r"3 ranks saved.*of 2 are here; rank 2's is missing",
    one_too_many: r"3 ranks saved.*of 4 are here",
    of_two_saves: r"two files of rank 0",
    short: r"rank_1.*cut short, damaged",
    no_model: r"no \*_model_states.pt lies",
    no_optimizer: r"3 ranks saved.*of 0 are here; rank 0's is missing",
    out_of_the_folder: r"rank_1.*leads out of its folder",
    empty_pointer: r"latest: empty.*global_step2",
    escaping_pointer: r"names '\.\./.*nothing was read.*global_step2",
    no_pointer: r"no file `latest`.*global_step2",
    stale_pointer: r"names 'global_step9', where no .*global_step2",
    experts: r"layer_0_expert_1.*experts of DeepSpeed's own MoE",
    tensor_parallel: r"mp_rank_01.*tensor parallelism",
    other_values: r"element",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_refused_by_name(made: Any, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    for plain in (Plain(2, bf16=True, groups=2), Plain(3, groups=2, zero=SUB_GROUPS)):
        home = shutil.copytree(made(3, plain), tmp_path / str(plain))
        damage(home / "global_step2")
        with pytest.raises(InputError, match=f"(?s){DAMAGE[damage]}"):
            open_deepspeed(home)


def test_a_folder_is_told_from_others(made: Any, tmp_path: Path) -> None:
    home = made(1, Plain(1))
    assert is_deepspeed(home) and is_deepspeed(home / "global_step2")
    assert not is_deepspeed(tmp_path) and not is_deepspeed(home.parent) and not is_deepspeed(home / "latest")
    empty = shutil.copytree(home, tmp_path / "empty")
    (empty / "latest").write_text("")
    assert is_deepspeed(empty), "so that opening it says what is wrong"


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of Hugging Face's Trainer and of Accelerate."""
    folder = tmp_path_factory.mktemp("others")
    ended = train(2, str(folder), outputs=folder / "output", program=train_with_each, timeout=150)
    assert ended.statuses == (0, 0), ended.text
    return folder


def logits_of(model: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and (weights.keys() | set(missing)) == model.state_dict().keys()
    model.tie_weights()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(6)[None]).logits[0]
    return logits


def test_a_checkpoint_of_accelerate(others: Path) -> None:
    reader = open_deepspeed(others / "accelerate")
    assert is_deepspeed(others / "accelerate") and is_deepspeed(others / "accelerate" / "pytorch_model")
    assert reader.tied == {"lm_head.weight": "model.embed_tokens.weight"} and reader.has("exp_avg_sq")
    ours = logits_of(model_of(PLAIN), {name: whole(reader, "fp32", name) for name in reader.names})
    expected = torch.tensor(json.loads((others / "accelerate" / "logits.json").read_text()))
    assert torch.allclose(ours, expected, atol=1e-6)


def test_a_checkpoint_of_the_trainer_with_lora(others: Path) -> None:
    """The Trainer saves it without the frozen weights: the adapter can be exported, and loads in PEFT."""
    import peft

    home = others / "trainer" / "checkpoint-2"
    reader = open_deepspeed(home)
    with pytest.raises(InputError, match="--lora adapter"):
        with_adapters(reader, None, merge=True)
    export(home, others / "adapter", Wanted(lora="adapter"))
    loaded = peft.PeftModel.from_pretrained(model_of(PLAIN), others / "adapter")
    with torch.no_grad():
        ours = loaded(input_ids=torch.arange(6)[None]).logits[0]
    expected = torch.tensor(json.loads((others / "trainer" / "logits.json").read_text()))
    assert torch.allclose(ours, expected, atol=1e-6)
    untouched = model_of(PLAIN)(input_ids=torch.arange(6)[None]).logits[0]
    assert not torch.allclose(ours, untouched, atol=1e-3), "the adapter does something"
