"""The doctor as people start it, on machines that are really broken: it names each cause."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.clusters.doctor import DOCTOR, LIMIT_SECONDS, examine, named, of, only
from tests.e2e.launchers import BIN, ROOT, environment, free_port

FULL_BYTES = 2**20


@contextmanager
def full_disk(folder: Path) -> Iterator[dict[str, object]]:
    """A run folder that can take no more: a full file system where it may be mounted, else a limit of a file's size.

    Yields the options for the process that is to see it.
    """
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode:
        yield {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))}
        return
    try:
        with (folder / "filled").open("wb", buffering=0) as file:
            file.write(bytes(FULL_BYTES))
        yield {}
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_one_machine_with_eight_things_broken_at_once(tmp_path: Path) -> None:
    """Interface, port, compiler, open files, .deepspeed_env, hostfile, disk and a name: each is told with its cause.

    So are settings that name a model which is not there.
    """
    (tmp_path / "run.yaml").write_text(f"model_name: {tmp_path}/no-model\ntrain_data: {tmp_path}/none.jsonl\n")
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\nOMP_NUM_THREADS=4\n")
    with socket.create_server(("", 0)) as taken, full_disk(tmp_path / "run") as options:
        port = taken.getsockname()[1]
        env = {
            "GLOO_SOCKET_IFNAME": "nosuch0",
            "MASTER_PORT": str(port),
            "CXX": str(tmp_path / "no-compiler"),
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NODELIST": f"{socket.gethostname()},nosuch-host.invalid",
        }
        limited = ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash", sys.executable, str(DOCTOR)]
        flags = ["--quick", "--config", "run.yaml", "--run_folder", str(tmp_path / "run"), "--hostfile", "hostfile"]
        status, report, shown = examine([*limited, *flags], env, tmp_path, **options)
    assert status == 2
    assert "GLOO_SOCKET_IFNAME=nosuch0 names no interface" in only(report, "interface.missing", "error")["text"]
    in_use = only(report, "port.in_use", "error")
    assert str(port) in in_use["text"] and f"process {os.getpid()}" in in_use["text"]
    compiler = only(report, "compiler.missing", "warning")
    assert f"CXX={tmp_path}/no-compiler names no program" in compiler["text"] and "DeepSpeedCPUAdam" in compiler["text"]
    assert "ZeRO 1 to 3" in compiler["advice"]
    assert only(report, "limits.open_files", "error")["data"]["soft"] == 64
    assert f"{tmp_path}/.deepspeed_env:2: a blank line" in only(report, "deepspeed_env.line", "error")["text"]
    assert "train on this machine alone" in only(report, "hostfile.missing", "error")["cause"]
    assert of(report, "folder.full", "error") or of(report, "folder.file_size", "error")
    assert only(report, "name.unknown", "error")["data"]["names"] == ["nosuch-host.invalid"]
    wrong = " ".join(one["text"] for one in of(report, "settings.wrong", "error"))
    assert "no-model" in wrong and "none.jsonl" in wrong
    assert not of(report, "doctor.failed") and not of(report, "doctor.hangs")
    for name in named(report, "error") | named(report, "warning"):
        assert name in shown


def test_ranks_that_differ_and_a_world_that_is_too_small(tmp_path: Path) -> None:
    """A package, the code, a variable and a limit of one rank, and hosts of the job on which nothing runs."""
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(ROOT / "ds_recipes", one / "ds_recipes", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (ROOT / "train.py", ROOT / "pyproject.toml", DOCTOR):
        shutil.copy(file, one)
    shutil.copytree(one, other)
    with (other / "ds_recipes" / "ranges.py").open("a") as file:
        file.write("# a change that nobody told of\n")
    older = other / "safetensors-0.8.99.dist-info"
    older.mkdir()
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 0.8.99\n")
    shared = ["-np", "1", "-x", "OMP_NUM_THREADS"]
    flags = ["--quick", "--expected_world_size", "4", "--run_folder", str(tmp_path)]
    words = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    words += [*shared, "-x", f"PYTHONPATH={one}"]
    words += [sys.executable, str(one / "doctor.py"), *flags, "--json", str(tmp_path / "found.json"), ":"]
    words += [*shared, "-x", f"PYTHONPATH={other}", "-x", "NCCL_DEBUG=INFO"]
    words += ["bash", "-c", 'ulimit -n 96; exec "$@"', "bash", sys.executable, str(other / "doctor.py"), *flags]
    done = subprocess.run(
        words,
        env=environment({"PBS_JOBID": "7.pbs", "PBS_NODEFILE": str(_nodes(tmp_path, "localhost", "n2", "n3"))}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    report = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == 2, done.stdout + done.stderr
    assert "0.8.99 (rank 1 on" in only(report, "ranks.package", "error")["text"]
    code = only(report, "ranks.code", "error")
    assert code["data"]["files"] == ["ds_recipes/ranges.py"] and str(other) in code["cause"]
    assert "INFO (rank 1" in next(one["text"] for one in of(report, "ranks.variable") if "NCCL_DEBUG" in one["text"])
    assert only(report, "limits.open_files", "error")["ranks"] == [1]
    assert only(report, "world.size", "error")["data"] == {"expected": 4, "found": 2}
    idle = only(report, "job.hosts_idle", "error")
    assert idle["data"]["idle"] == ["localhost", "n2", "n3"]
    assert done.stdout.count("exit status 2") == 1, "one report, on rank 0"


def _nodes(folder: Path, *hosts: str) -> Path:
    file = folder / "nodes"
    file.write_text("".join(f"{host}\n" for host in hosts))
    return file


def test_hosts_of_a_hostfile_that_cannot_be_used(tmp_path: Path) -> None:
    """One whose name leads nowhere, and one at which no sshd listens; then a file that names a host twice."""
    hostfile = tmp_path / "hostfile"
    words = [sys.executable, str(DOCTOR), "--quick", "--hostfile", str(hostfile)]
    env = {"PDSH_SSH_ARGS_APPEND": f"-p {free_port()}"}
    hostfile.write_text("nosuch-host.invalid slots=2\n127.0.0.1 slots=2\n")
    status, report, _ = examine(words, env, tmp_path)
    assert status == 2
    if shutil.which("ssh"):
        assert only(report, "hostfile.unknown_host", "error")["data"] == {"host": "nosuch-host.invalid"}
        refused = only(report, "ssh.refused", "error")
        assert refused["hosts"] == ["127.0.0.1"] and "refused" in refused["text"] and "no sshd" in refused["cause"]
    else:
        assert only(report, "ssh.missing", "error")
    hostfile.write_text("localhost slots=2\nlocalhost slots=2\n")
    status, report, _ = examine(words, env, tmp_path)
    assert (
        status == 2
        and f"{hostfile}:2: localhost stands on line 1 already" in only(report, "hostfile.wrong", "error")["text"]
    )


def test_without_any_package_it_still_says_so(tmp_path: Path) -> None:
    """No site-packages at all: neither torch, nor what the page is coloured with."""
    status, report, shown = examine([sys.executable, "-S", str(DOCTOR)], {"PYTHONPATH": str(ROOT)}, tmp_path)
    assert status == 2
    assert only(report, "package.missing", "error")["data"] == {"package": "packaging"}
    assert "ERROR  package.missing" in shown
    packaging = Path(next(path for path in sys.path if (Path(path) / "packaging").is_dir())) / "packaging"
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "packaging").symlink_to(packaging)
    path = f"{ROOT}{os.pathsep}{tmp_path}/some"
    status, report, shown = examine([sys.executable, "-S", str(DOCTOR)], {"PYTHONPATH": path}, tmp_path)
    missing = {one["data"]["package"] for one in of(report, "package.missing", "error")}
    assert status == 2 and {"torch", "deepspeed", "transformers", "rich"} <= missing
    assert "torch is not installed for" in shown
    assert "package.missing" in only(report, "probe.skipped", "warning")["cause"]


@contextmanager
def read_only(folder: Path) -> Iterator[list[str]]:
    """A folder on a read-only mount, for root; for anybody else one whose mode says so. Yields words before the doctor."""
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield []
        return
    script = 'mount -t tmpfs -o ro tmpfs "$0" && exec "$@"'
    tried = subprocess.run(["unshare", "--mount", "sh", "-c", script, str(folder), "true"], capture_output=True)
    if tried.returncode == 0:
        yield ["unshare", "--mount", "sh", "-c", script, str(folder)]
    else:  # a root that may not mount: whatever it is, it cannot write below a file
        folder.rmdir()
        folder.write_text("")
        yield []


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with read_only(folder) as before:
        words = [*before, sys.executable, str(DOCTOR), "--quick", "--run_folder", str(folder)]
        status, report, _ = examine(words, None, tmp_path)
    assert status == 2
    (found,) = [*of(report, "folder.read_only", "error"), *of(report, "folder.unusable", "error")]
    assert str(folder) in found["text"] and found["cause"]


def test_help_needs_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(DOCTOR), "--help"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "--hostfile" in done.stdout and BIN.is_dir()
