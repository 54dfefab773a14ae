"""Flags win over the run file, the run file over defaults, and all texts go through one parser."""

import subprocess
import sys
from pathlib import Path

import pytest

from ds_recipes.config.load import load_config
from ds_recipes.config.schema import SETTINGS, values_of
from ds_recipes.errors import ConfigError
from tests.unit.config.settings import NEEDED, load

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def from_yaml(text: str, flags: str = "") -> dict[str, object]:
    Path("run.yaml").write_text(text, encoding="utf-8")
    return values_of(load(f"--config run.yaml {flags}"))


@pytest.mark.parametrize("written", ["1e-4", "0.0001", "'1e-4'", '"0.0001"', "1.0e-04", "+1E-4"])
def test_a_number_is_a_number_however_it_is_written(written: str) -> None:
    assert from_yaml(f"lr: {written}")["lr"] == 1e-4
    assert values_of(load(f"--lr {written.strip(chr(34) + chr(39))}"))["lr"] == 1e-4


@pytest.mark.parametrize("word", ["no", "No", "off", "false", "FALSE", "0", "'no'"])
def test_no_is_false_in_a_run_file_and_on_the_command_line(word: str) -> None:
    assert from_yaml(f"tensorboard: {word}", "--tensorboard true")["tensorboard"] is True
    assert from_yaml(f"save_optimizer: {word}")["save_optimizer"] is False
    assert values_of(load(f"--save_optimizer={word.strip(chr(39))}"))["save_optimizer"] is False


def test_words_that_yaml_takes_for_something_else_stay_text() -> None:
    values = from_yaml("wandb_project: no\nwandb_name: 1e3\nwandb_entity: 2024-01-01")
    assert (values["wandb_project"], values["wandb_name"], values["wandb_entity"]) == ("no", "1e3", "2024-01-01")


@pytest.mark.parametrize(("text", "number"), [("1e9", 10**9), ("1_000", 1000), ("8", 8), ("8.0", 8)])
def test_whole_numbers_may_be_written_with_an_exponent(text: str, number: int) -> None:
    assert load(f"--max_tokens {text}").run.max_tokens == number


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("11h40m", 42_000), ("90m", 5400), ("45s", 45), ("2h", 7200), ("1h1m1s", 3661), ("100m", 6000)],
)
def test_durations_are_seconds(text: str, seconds: int) -> None:
    assert load(f"--stop_after {text}").checkpoint.stop_after == seconds


@pytest.mark.parametrize("word", ["None", "none", "null", "~", ""])
def test_none_takes_a_value_back(word: str) -> None:
    Path("run.yaml").write_text("max_steps: 10\n", encoding="utf-8")
    assert load_config([*NEEDED, "--config", "run.yaml", "--max_steps", word]).run.max_steps is None


def test_none_stays_a_word_where_it_is_a_choice() -> None:
    assert load("--resume none").checkpoint.resume == "none"


def test_a_list_is_several_values_or_one() -> None:
    assert from_yaml("validation_data: [a, 'b c']")["validation_data"] == ("a", "b c")
    assert from_yaml("validation_data: a b")["validation_data"] == ("a b",)
    assert load("--validation_data a b").data.validation_data == ("a", "b")
    assert load("--validation_data=a").data.validation_data == ("a",)


def test_flags_win_over_the_run_file_and_it_over_defaults() -> None:
    Path("run.yaml").write_text("lr: 2e-4\nweight_decay: 0.2\n", encoding="utf-8")
    config = load("--config run.yaml --lr 3e-4")
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.adam_beta1) == (3e-4, 0.2, 0.9)
    origins = [config.origins[name] for name in ("lr", "weight_decay", "adam_beta1")]
    assert origins == ["command line", "run.yaml:2", "default"]


@pytest.mark.parametrize("flag", ["gradient_accumulation_steps", "global_batch_size"])
def test_a_flag_replaces_the_run_files_other_way_of_saying_it(flag: str) -> None:
    other = {"gradient_accumulation_steps": "global_batch_size", "global_batch_size": "gradient_accumulation_steps"}[
        flag
    ]
    values = from_yaml(f"{other}: 16", f"--{flag} 4")
    assert (values[flag], values[other]) == (4, None)


def test_both_ways_on_one_level_are_kept_for_the_plan_to_compare() -> None:
    values = from_yaml("global_batch_size: 16\ngradient_accumulation_steps: 4")
    assert (values["global_batch_size"], values["gradient_accumulation_steps"]) == (16, 4)


def test_the_same_flag_twice_is_fine_when_it_says_the_same() -> None:
    assert load("--lr 1e-3 --lr 0.001").optimizer.lr == 1e-3


def test_an_empty_run_file_changes_nothing() -> None:
    Path("run.yaml").write_text("# nothing yet\n", encoding="utf-8")
    assert load("--config run.yaml") == load()


def test_a_run_file_in_utf8_with_a_byte_order_mark_is_read() -> None:
    Path("run.yaml").write_bytes("wandb_project: 日本語\n".encode("utf-8-sig"))
    assert load("--config run.yaml").logging.wandb_project == "日本語"


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local_rank 1", "--local-rank=1"])
def test_the_launchers_local_rank_must_be_the_environments(flag: str) -> None:
    argv = [*NEEDED, *flag.split()]
    assert load_config(argv, env={"LOCAL_RANK": "1"}) == load_config(argv, env={}) == load()
    with pytest.raises(ConfigError, match=r"--local_rank is 1 \(command line\), but LOCAL_RANK is 0 \(environment\)"):
        load_config(argv, env={"LOCAL_RANK": "0"})


def test_every_setting_has_a_documentation_and_a_default_that_keeps_its_own_limits() -> None:
    for name, value in values_of(load()).items():
        assert SETTINGS[name].metadata["doc"].endswith((".", "not.")), name
        limits = SETTINGS[name].metadata["limits"]
        assert value in (None, ()) or not limits.choices or value in limits.choices, name


def test_help_and_errors_come_without_torch() -> None:
    code = (
        "import sys\nfrom ds_recipes.config.load import load_config\nimport ds_recipes.config.check\n"
        "try: load_config(sys.argv[1:])\nexcept (SystemExit, Exception): pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'deepspeed'} & set(sys.modules)\nsys.exit(repr(heavy) if heavy else 0)"
    )
    for argv in (["--help"], ["--nonsense"], [*NEEDED, "--print_config"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_config(["--lr", "nonsense", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"--{name} " in text for name in SETTINGS)
    assert max(map(len, text.splitlines())) <= 120
