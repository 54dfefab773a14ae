"""Variables for other hosts: what is written arrives, what DeepSpeed's launcher would crash on is named, secrets stay here."""

import os
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_recipes.cluster import deepspeed_env
from ds_recipes.cluster.exports import exported_names, without_secrets
from ds_recipes.errors import ConfigError

VALUES = st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"]), max_size=30)


def arrived(tmp_path: Path, variables: dict[str, str]) -> dict[str, str]:
    """What a rank's shell has after DeepSpeed's own reading, its quoting, and pdsh's replacements (%% is %; pdsh(1))."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    file = tmp_path / "env"
    file.write_text(deepspeed_env.text_of(variables), encoding="utf-8")
    options = Namespace(
        user_args=[], user_script="x", launcher_args="", ssh_port=None, master_addr="a", master_port=1, venv_script=None,
        no_python=False, module=False, no_local_rank=False, save_pid=False, enable_each_rank_log=None,
    )  # fmt: skip
    runner = PDSHRunner(options, "")
    with file.open() as lines:
        for line in lines.readlines():
            runner.add_export(*line.split("=", maxsplit=1))
    command, _, _ = runner.get_cmd({}, {"alpha": [0]})
    exports = next(word for word in command if word.startswith("export ")).replace("%%", "%")
    done = subprocess.run(
        ["sh", "-c", exports + " env -0"], capture_output=True, check=True, env={"PATH": os.environ["PATH"]}
    )
    pairs = (item.partition(b"=") for item in done.stdout.split(b"\0") if item)
    return {name.decode(): value.decode() for name, _, value in pairs}


@settings(deadline=None)  # other tests load the machine
@given(values=st.lists(VALUES, min_size=1, max_size=8))
@example(
    [
        "",
        " ",
        "a b",
        "a=b",
        '"',
        "'",
        "$HOME",
        "`id`",
        "\\",
        "x \\",
        "  both  ",
        "%h%n%%",
        ";&|<>*?#!~",
        "\t",
        "\u3000x",
    ]
)
def test_what_is_written_arrives_unchanged(tmp_path_factory: pytest.TempPathFactory, values: list[str]) -> None:
    variables = {f"V{number}": value for number, value in enumerate(values)}
    found = arrived(tmp_path_factory.mktemp("env"), variables)
    assert {name: found.get(name) for name in variables} == variables


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "\n"])
def test_a_line_break_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="V has a line break"):
        deepspeed_env.encode("V", value)


@pytest.mark.parametrize("name", ["", "A B", "1A", "A-B", "BASH_FUNC_module%%"])
def test_what_is_no_variable_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name of a variable"):
        deepspeed_env.encode(name, "x")


def test_each_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / ".deepspeed_env"
    file.write_text("A=1\n\n# note\nNOTHING\nexport B=2\nC=\n  \nD=a=b c\n")
    with pytest.raises(ConfigError) as caught:
        deepspeed_env.read_lines(file)
    numbers = [problem.partition(": ")[0].rpartition(":")[2] for problem in caught.value.problems]
    assert numbers == ["2", "3", "4", "5", "7"]
    file.write_text("A=1\nC=\nD=a=b c\n")
    assert deepspeed_env.read_lines(file) == {"A": "A=1", "C": "C=", "D": "D=a=b c"}


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"A=\xff\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        deepspeed_env.read_lines(tmp_path / "x")


def test_which_file_deepspeed_reads(tmp_path: Path) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    env = {"HOME": str(home)}
    assert deepspeed_env.files_read(env, work) == []
    for folder in (work, home):
        (folder / ".deepspeed_env").write_text("A=1\n")
        (folder / "mine").write_text("A=2\n")
    assert deepspeed_env.files_read(env, work) == [home / ".deepspeed_env", work / ".deepspeed_env"]
    assert deepspeed_env.files_read(env | {"DS_ENV_FILE": "mine"}, work) == [home / "mine", work / "mine"]
    assert deepspeed_env.files_read(env | {"DS_ENV_FILE": str(work / "mine")}, work) == [work / "mine"]


def test_a_users_own_line_counts_and_stays_as_it_is() -> None:
    text = deepspeed_env.text_of({"A": "1", "B": "2"}, {"B": 'B="$HOME"', "C": "C=3"})
    assert text == 'A=1\nB="$HOME"\nC=3\n'


def test_usual_variables_go_and_each_hosts_own_stay() -> None:
    env = {
        "NCCL_SOCKET_IFNAME": "ib0",
        "GLOO_SOCKET_IFNAME": "ib0",
        "PATH": "/bin",
        "WANDB_API_KEY": "x",
        "HF_TOKEN": "y",
    }
    env |= {"MINE": "1", "CUDA_VISIBLE_DEVICES": "0", "SLURM_PROCID": "0", "HOSTNAME": "a", "DS_ENV_FILE": "f"}
    env |= {"BASH_FUNC_module%%": "() {", "PYTHON %": "1"}
    names = exported_names(env, ["MINE", "UNSET"])
    assert names == ["GLOO_SOCKET_IFNAME", "HF_TOKEN", "MINE", "NCCL_SOCKET_IFNAME", "PATH", "WANDB_API_KEY"]
    assert without_secrets(names) == ["GLOO_SOCKET_IFNAME", "MINE", "NCCL_SOCKET_IFNAME", "PATH"]
    assert "HF_TOKEN" in without_secrets(names, ["HF_TOKEN"])
