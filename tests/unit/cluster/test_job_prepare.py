"""What a job script is told before the ranks start: hosts, ids, files; and what is refused before anything is started."""

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.cluster.hostfile import HostSlots, read_hostfile
from ds_recipes.cluster.prepare import Prepared, Request, prepare
from ds_recipes.errors import ConfigError, WorldError
from ds_recipes.world.resolve import derived_port
from tools.prepare_launch import main

RUN_FILE = "model_name: m\ntrain_data: d.jsonl\nbatch_size_training: 2\nglobal_batch_size: 16\nmax_steps: 5\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    (tmp_path / "hosts").write_text("beta slots=4\nalpha slots=2\n")
    return tmp_path


def ask(folder: Path, env: dict[str, str] | None = None, **fields: Any) -> Prepared:
    usual = {
        "run_folder": folder / "run",
        "config": str(folder / "run.yaml"),
        "launcher": "mpirun",
        "ranks_per_host": 2,
    }
    return prepare(Request(**(usual | fields)), env or {}, folder)


def pbs(folder: Path, *hosts: str, job: str = "77.server") -> dict[str, str]:
    (folder / "nodes").write_text("".join(f"{host}\n" for host in hosts))
    return {"PBS_JOBID": job, "PBS_NODEFILE": str(folder / "nodes")}


@pytest.mark.parametrize("hosts", [["b", "a"], ["b", "b", "b", "a", "a", "a"]])
def test_hosts_of_the_scheduler_repeated_or_not(hosts: list[str], folder: Path) -> None:
    found = ask(folder, pbs(folder, *hosts))
    assert (found.shell["NUM_HOSTS"], found.shell["NUM_RANKS"], found.shell["HOSTS"]) == ("2", "4", ["b", "a"])
    assert read_hostfile(str(found.shell["HOSTFILE"])) == [HostSlots("b", 2), HostSlots("a", 2)]
    assert found.variables["MASTER_ADDR"] == "b"
    assert found.variables["MASTER_PORT"] == str(derived_port("77.1"))  # b is another machine, so it is not looked at
    assert found.shell["HOSTFILE"] == str(folder / "run" / "jobs" / "77" / "hostfile")


def test_a_job_that_is_queued_again_is_another_launch(folder: Path) -> None:
    launches = [ask(folder, pbs(folder, "a", "b")) for _ in range(3)]
    assert [found.variables["DS_RECIPES_LAUNCH"] for found in launches] == ["77.1", "77.2", "77.3"]
    assert len({found.shell["LOG_FOLDER"] for found in launches}) == 3
    assert all(Path(str(found.shell["LOG_FOLDER"])).is_dir() for found in launches)


def test_a_hostfile_and_its_order(folder: Path) -> None:
    found = ask(folder, hostfile=str(folder / "hosts"), num_hosts=2)
    assert found.shell["HOSTS"] == ["beta", "alpha"]
    assert found.variables["MASTER_ADDR"] == "beta"


def test_this_machine_alone(folder: Path) -> None:
    found = ask(folder)
    assert (found.shell["HOSTS"], found.shell["NUM_RANKS"]) == (["localhost"], "2")
    assert found.variables["MASTER_ADDR"] == "127.0.0.1"
    assert {"DS_RECIPES_LAUNCH", "MASTER_ADDR", "MASTER_PORT"} <= set(found.shell["EXPORTED"])


def test_the_port_is_free_where_rank_0_is_here(folder: Path) -> None:
    with socket.socket() as other:
        env = pbs(folder, "localhost")
        other.bind(("", derived_port("77.1")))
        other.listen(1)
        assert int(ask(folder, env).variables["MASTER_PORT"]) != derived_port("77.1")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hosts": 4}, "4 hosts are planned, but this machine"),
        ({"num_hosts": 3, "hostfile": "hosts"}, "3 hosts are planned, but .*hosts gives 2: beta, alpha"),
        ({"hostfile": "hosts", "ranks_per_host": 4}, "fewer slots than 4 ranks a host for: alpha"),
        ({"hostfile": "missing"}, "cannot be read"),
    ],
)
def test_other_hosts_than_planned_are_refused(fields: dict[str, Any], words: str, folder: Path) -> None:
    if "hostfile" in fields:
        fields = fields | {"hostfile": str(folder / fields["hostfile"])}
    with pytest.raises(WorldError, match=words):
        ask(folder, **fields)
    assert not (folder / "run").exists()


def test_a_global_batch_that_is_too_small(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(folder, pbs(folder, *"abcdefgh"))
    (problem,) = caught.value.problems
    assert problem.startswith("Global batch size is too small for the number of GPUs: global_batch_size is 16")
    for words in (
        "run.yaml",
        "batch_size_training 2 x 16 ranks",
        "32 rows",
        "Set global_batch_size to 32",
        "batch_size_training to 1",
    ):
        assert words in problem
    assert not (folder / "run").exists()
    assert ask(folder, pbs(folder, *"abcdefgh"), arguments=("--global_batch_size", "32")).shell["NUM_RANKS"] == "16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--global_batch_size", "17"), "no whole number"),
        (("--bath_size", "1"), "bath_size"),
        (("--expected_world_size", "9"), "expected_world_size"),
        (("--help",), "only prints"),
        (("--print_config",), "only prints"),
    ],
)
def test_wrong_flags_are_refused_before_the_start(
    arguments: tuple[str, ...], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=words):
        ask(folder, arguments=arguments)
    assert capsys.readouterr().out == ""  # a script evaluates what comes there


def test_the_time_that_is_left(folder: Path) -> None:
    def flags(**fields: Any) -> list[str]:
        train = list(ask(folder, **fields).shell["TRAIN"])
        return train[train.index("--stop_after") : train.index("--stop_after") + 2] if "--stop_after" in train else []

    assert flags(walltime_seconds=3600, lead_seconds=300, elapsed_seconds=40) == ["--stop_after", "3260s"]
    assert flags() == []
    assert flags(walltime_seconds=3600, arguments=("--stop_after", "50s")) == ["--stop_after", "50s"]
    with pytest.raises(ConfigError, match="no time to train"):
        flags(walltime_seconds=400, lead_seconds=300, elapsed_seconds=100)


def test_deepspeeds_file_of_variables(folder: Path) -> None:
    env = {"HOME": str(folder), "NCCL_DEBUG": "a b", "WANDB_API_KEY": "secret", "MINE": "1"} | pbs(folder, "a", "b")
    (folder / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nOWN=x\n")
    found = ask(folder, env, launcher="deepspeed", export=("MINE",))
    file = Path(found.variables["DS_ENV_FILE"])
    lines = file.read_text().splitlines()
    for line in ("NCCL_DEBUG=WARN", "OWN=x", "MINE=1", "DS_RECIPES_LAUNCH=77.1"):
        assert line in lines
    assert "secret" not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    (folder / ".deepspeed_env").write_text("OWN=x\n\n")
    with pytest.raises(ConfigError, match=r"deepspeed_env:2: a blank line"):
        ask(folder, env, launcher="deepspeed")
    assert (
        "DS_ENV_FILE" not in ask(folder, env | pbs(folder, "a"), launcher="deepspeed").variables
    )  # it reads none then


@pytest.mark.parametrize("name", ["a b", "it's", "$1", "(1)", "*"])
def test_names_that_deepspeeds_launcher_cannot_carry(name: str, folder: Path) -> None:
    two, one = pbs(folder, "a", "b"), {}
    with pytest.raises(ConfigError, match="without quotes"):
        ask(folder, two, launcher="deepspeed", run_folder=folder / name)
    assert ask(folder, one, launcher="deepspeed", run_folder=folder / name)
    assert ask(folder, two, launcher="mpirun", run_folder=folder / name)


def test_torchruns_file_of_variables_is_read_by_a_shell_as_it_was(folder: Path) -> None:
    env = {"NCCL_DEBUG": 'it\'s "x" $y\nz', "HF_TOKEN": "secret", "PATH": os.environ["PATH"]} | pbs(folder, "a", "b")
    found = ask(folder, env, launcher="torchrun")
    file = Path(str(found.shell["ENVIRONMENT"]))
    done = subprocess.run(
        ["sh", "-c", f". '{file}' && printf %s \"$NCCL_DEBUG\""], capture_output=True, text=True, env={}
    )
    assert done.stdout == env["NCCL_DEBUG"]
    assert "secret" not in file.read_text()


def test_copies_on_each_host_come_to_the_same(folder: Path) -> None:
    fields = {"launcher": "torchrun", "hostfile": str(folder / "hosts"), "launch_id": "run7"}
    first, second = ask(folder, **fields), ask(folder, **fields)
    assert first.variables == second.variables
    assert first.variables["DS_RECIPES_LAUNCH"] == "run7"
    (folder / "run" / "run.json").write_text('{"launches": [{"launch": "run7", "state": "complete"}]}')
    with pytest.raises(ConfigError, match="new LAUNCH_ID"):
        ask(folder, **fields)


def test_a_shell_gets_every_word_as_it_is(folder: Path) -> None:
    odd = folder / "it's $HOME *" / "a b"
    found = ask(folder, run_folder=odd, arguments=("--wandb_project", "p", "--wandb_name", 'a  "b" `c`'))
    script = found.assignments() + """\nprintf '%s\\0' "${TRAIN[@]}" "$LOG_FOLDER" "$DS_RECIPES_LAUNCH" """
    done = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, check=True)
    words = done.stdout.split("\0")[:-1]
    assert words == [*found.shell["TRAIN"], found.shell["LOG_FOLDER"], found.variables["DS_RECIPES_LAUNCH"]]
    assert str(odd) in words


def test_the_tool_prints_nothing_for_the_script_where_it_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = [
        "--run_folder",
        "run",
        "--config",
        "run.yaml",
        "--launcher",
        "mpirun",
        "--ranks_per_host",
        "2",
        "--hostfile",
        "",
    ]
    assert main([*words, "--num_hosts", "2", "--export", "--"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "2 hosts are planned" in said.err
    assert main([*words, "--walltime", "1:00:00", "--export", "A", "B", "--", "--max_steps", "7"]) == 0
    said = capsys.readouterr()
    assert (
        "TRAIN=(train.py --config run.yaml --save_checkpoint_path run --expected_world_size 2 --stop_after 3300s --max_steps 7)"
        in said.out
    )
