"""What makes a Grid Engine of two hosts, run as process 1 of new network, name, mount and process namespaces.

    unshare --net --uts --mount --pid --fork --kill-child --mount-proc python -m tests.clusters.grid_engine_inside ...

Debian's build has its folders compiled in, so the work folder's own are mounted over them; the same for /etc/hosts and
the list of users. Nothing of the machine is changed, and everything is gone when this process ends, which it does with
its standard input.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SEPARATE = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""Into namespaces of its own, whose processes all end with this one."""

USER, USER_ID = "trainer", 54321
"""Who submits the jobs: Debian's configuration refuses users with an id below 1000."""

ADMIN, SPOOL = "sgeadmin", "/var/spool/gridengine"
SGE = {"SGE_ROOT": "/var/lib/gridengine", "SGE_CELL": "default"}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOSTS = {"node1": "10.99.0.1", "node2": "10.99.0.2"}
"""The first one is the master too. A name must not stand for 127.0.0.1: the daemons refuse it."""

INITIALISE = f"/usr/share/gridengine/scripts/init_cluster {SGE['SGE_ROOT']} {SGE['SGE_CELL']} {SPOOL}/spooldb {ADMIN}"

JSV = """#!/bin/bash
# Turns `-l rt_F=N` into N hosts with one of it each, as ABCI's service did.
. {root}/util/resources/jsv/jsv_include.sh
jsv_on_start() {{ :; }}
jsv_on_verify() {{
    for name in rt_F rt_AF; do
        if [ "$(jsv_sub_is_param l_hard $name)" = true ]; then
            jsv_set_param pe_name $name
            jsv_set_param pe_min "$(jsv_sub_get_param l_hard $name)"
            jsv_set_param pe_max "$(jsv_sub_get_param l_hard $name)"
            jsv_sub_add_param l_hard $name 1
            jsv_correct "hosts of $name"
            return
        fi
    done
    jsv_accept "unchanged"
}}
jsv_main
"""

STARTER = """#!/bin/bash
# Gives the job ABCI's own two variables. What qrsh starts on the job's other hosts is a command line for the shell.
[ "$1" = "${JOB_SCRIPT:-}" ] || exec /bin/sh -c "$*"
if [[ ${PE:-} == rt_* ]]; then
    export SGE_RESOURCE_TYPE=$PE SGE_JOB_HOSTLIST=$TMPDIR/hostlist
    cut -d ' ' -f 1 "$PE_HOSTFILE" >"$SGE_JOB_HOSTLIST"
fi
exec "$@"
"""

MODULES = 'module() { echo "module $*"; }\n'
"""Where sites define the command `module`; this one loads nothing."""

WHOLE_NODES = ("rt_F", "rt_AF")
ACCOUNTING = (
    "reporting_params accounting=true reporting=false flush_time=00:00:01 accounting_flush_time=00:00:00 "
    "joblog=false sharelog=00:00:00"
)
FAST_SCHEDULER = ("schedule_interval 0:0:1", "flush_submit_sec 1", "flush_finish_sec 1")
GROUP = "group_name @allhosts\nhostlist node1 node2\n"
PARALLEL = """pe_name {name}
slots 999
user_lists NONE
xuser_lists NONE
start_proc_args NONE
stop_proc_args NONE
allocation_rule {rule}
control_slaves TRUE
job_is_first_task FALSE
urgency_slots min
accounting_summary TRUE
qsort_args NONE
"""

HOST = """hostname {host}
complex_values rt_F=1,rt_AF=1
""" + "".join(
    f"{name} NONE\n"
    for name in (
        "load_scaling",
        "user_lists",
        "xuser_lists",
        "projects",
        "xprojects",
        "usage_scaling",
        "report_variables",
    )
)
QUEUE = """qname all.q
hostlist @allhosts
seq_no 0
load_thresholds NONE
suspend_thresholds NONE
nsuspend 1
suspend_interval 00:05:00
priority 0
min_cpu_interval 00:05:00
processors UNDEFINED
qtype BATCH INTERACTIVE
ckpt_list NONE
pe_list mpi rt_F rt_AF
rerun FALSE
slots 8
tmpdir {work}/tmp
shell /bin/bash
prolog NONE
epilog NONE
shell_start_mode unix_behavior
starter_method {work}/starter
suspend_method NONE
resume_method NONE
terminate_method NONE
notify 00:00:10
owner_list NONE
user_lists NONE
xuser_lists NONE
subordinate_list NONE
complex_values NONE
projects NONE
xprojects NONE
calendar NONE
initial_state default
""" + "".join(
    f"{kind}_{limit} INFINITY\n"
    for limit in ["rt", "cpu", "fsize", "data", "stack", "core", "rss", "vmem"]
    for kind in "sh"
)
"""`notify`: how long before the end a job that asks for it (-notify) is told."""


def main(arguments: Sequence[str]) -> int:
    """Make the hosts and start all of it in `arguments[0]`, show the other folders to the user, and wait to be ended."""
    work, readable = Path(arguments[0]), [Path(path) for path in arguments[1:]]
    os.environ.clear()  # a daemon's variables are seen by its jobs
    os.environ.update(SGE, PATH=PATH, LANG="C.UTF-8")
    _own_state(work)
    _open_way(readable, work / "stash")
    hosts = _connected_hosts()
    for command in (INITIALISE, "sge_qmaster"):
        _run(*hosts[0], "su", "-s", "/bin/sh", "-c", command, ADMIN)
    while subprocess.run([*hosts[0], "qconf", "-sh"], capture_output=True).returncode:
        time.sleep(0.05)  # whoever started this has a time limit
    _configure(work, hosts[0])
    for host in hosts:
        _run(*host, "sge_execd")
    print("ready", flush=True)
    sys.stdin.read()
    return 0


def _run(*words: str) -> None:
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def _connected_hosts() -> list[list[str]]:
    """Make the hosts, each a process that keeps its namespaces. Returns the words that run a command there."""
    ignore = "trap '' CHLD; exec sleep infinity"  # so that nothing there stays a zombie
    keepers = [subprocess.Popen([*SEPARATE, "sh", "-c", ignore], stdin=subprocess.DEVNULL) for _ in HOSTS]
    first, second = (str(child_of(keeper.pid)) for keeper in keepers)
    _run("ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
    inside = [["nsenter", "--target", target, "--all"] for target in (first, second)]
    for (host, address), into in zip(HOSTS.items(), inside, strict=True):
        _run(*into, "hostname", host)
        _run(*into, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _run(*into, "ip", "link", "set", interface, "up")
    return inside


def child_of(process_id: int) -> int:
    """The oldest child of a process, once it has one."""
    while not (children := Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()):
        time.sleep(0.01)
    return int(children[0])


def _own_state(work: Path) -> None:
    root, spool, etc = (work / name for name in ("root", "spool", "etc"))
    for folder in (root / "default/common", spool / "qmaster/job_scripts", spool / "spooldb", spool / "execd", etc):
        folder.mkdir(parents=True)
    for name in ("bin", "lib", "util", "utilbin"):
        _run("cp", "-a", f"{SGE['SGE_ROOT']}/{name}", str(root))
    common = root / "default/common"
    common.joinpath("bootstrap").write_bytes(Path("/usr/share/gridengine/default-bootstrap").read_bytes())
    common.joinpath("act_qmaster").write_text("node1\n")
    users, groups = Path("/etc/passwd").read_text(), Path("/etc/group").read_text()
    etc.joinpath("passwd").write_text(f"{users}{USER}:x:{USER_ID}:{USER_ID}::{work / 'home'}:/bin/bash\n")
    etc.joinpath("group").write_text(f"{groups}{USER}:x:{USER_ID}:\n")
    etc.joinpath("hosts").write_text(
        "".join(f"{ip} {host}\n" for host, ip in {"localhost": "127.0.0.1", **HOSTS}.items())
    )
    shutil.copytree("/etc/profile.d", etc / "profile.d")
    etc.joinpath("profile.d/modules.sh").write_text(MODULES)
    _run("chown", "-R", f"{ADMIN}:", str(root), str(spool))
    _run("mount", "--bind", str(root), SGE["SGE_ROOT"])
    _run("mount", "--bind", str(spool), SPOOL)
    for name in ("passwd", "group", "hosts", "profile.d"):
        _run("mount", "--bind", str(etc / name), f"/etc/{name}")


def _open_way(needed: Sequence[Path], stash: Path) -> None:
    """Let the user pass through folders that are root's alone: each is covered by one that holds only the way."""
    closed = {
        path: next((above for above in reversed(path.parents) if not above.stat().st_mode & 1), None) for path in needed
    }
    stash.mkdir(mode=0o700)
    kept: dict[Path, Path] = {}
    for number, folder in enumerate(dict.fromkeys(filter(None, closed.values()))):
        kept[folder] = stash / str(number)
        kept[folder].mkdir()
        _run("mount", "--bind", str(folder), str(kept[folder]))
        _run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(folder))
    for path, above in closed.items():
        if above is not None:
            path.mkdir(parents=True, exist_ok=True)
            _run("mount", "--bind", str(kept[above] / path.relative_to(above)), str(path))


def _configure(work: Path, master: Sequence[str]) -> None:
    """A fast scheduler, two hosts in one queue, parallel environments, and ABCI's resources."""

    def qconf(option: str, text: str, name: str = "") -> None:
        path = work / (name or option.strip("-"))
        path.write_text(text, encoding="utf-8")
        _run(*master, "qconf", option, str(path))

    def shown(option: str, *changed: str) -> str:
        """The present settings, some of them changed."""
        text = subprocess.run([*master, "qconf", option], check=True, capture_output=True, text=True).stdout
        names = {line.split()[0] for line in changed}
        kept = [line for line in text.splitlines() if not names.intersection(line.split()[:1])]
        return "\n".join([*kept, *changed, ""])

    for name, text in (("jsv", JSV.format(root=SGE["SGE_ROOT"])), ("starter", STARTER)):
        work.joinpath(name).write_text(text)
        work.joinpath(name).chmod(0o755)
    work.joinpath("tmp").mkdir()
    work.joinpath("tmp").chmod(0o1777)
    qconf("-Mconf", shown("-sconf", f"jsv_url script:{work / 'jsv'}", ACCOUNTING), "global")
    qconf("-Msconf", shown("-ssconf", *FAST_SCHEDULER))
    qconf("-Mc", shown("-sc", *(f"{name} {name} INT <= YES YES 0 0" for name in WHOLE_NODES)))
    for host in HOSTS:
        _run(*master, "qconf", "-ah", host)
        _run(*master, "qconf", "-as", host)
        qconf("-Ae", HOST.format(host=host))
    qconf("-Ahgrp", GROUP)
    for name, rule in {"mpi": "$fill_up", **dict.fromkeys(WHOLE_NODES, "1")}.items():
        qconf("-Ap", PARALLEL.format(name=name, rule=rule))
    qconf("-Aq", QUEUE.format(work=work))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
