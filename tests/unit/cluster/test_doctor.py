"""The doctor's own parts: a check that hangs or crashes, differences between ranks, what the probes' results mean, the page."""

import ast
import os
import re
import signal
import textwrap
import threading
import time
from pathlib import Path

import pytest

from ds_recipes.cluster.doctor import checks, compare, facts, gpus, links, probe_findings
from ds_recipes.cluster.doctor.checks import Check, Context, run_checks, run_one
from ds_recipes.cluster.doctor.compare import Member
from ds_recipes.cluster.doctor.findings import Finding, error, fine, from_json, has_errors, merge, warning
from ds_recipes.cluster.doctor.probe import PHASE_SECONDS, run_probe
from ds_recipes.cluster.doctor.report import Report, lines
from ds_recipes.world.allocation import Allocation
from ds_recipes.world.resolve import Place

ROOT = Path(__file__).resolve().parents[3]
DOCTOR = ROOT / "ds_recipes" / "cluster" / "doctor"

TOPOLOGY = """
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tPXB\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tPXB\t0-47\t0\t\tN/A
GPU2\tNV18\tSYS\t X \tNODE\t48-95\t1\t\tN/A
NIC0\tPXB\tPXB\tNODE\t X \t\t\t\t

Legend:
  NV#  = Connection traversing a bonded set of # NVLinks
"""
"""The layout of `nvidia-smi topo -m`, as NVIDIA's documentation of the program shows it."""


def context(**changes) -> Context:
    given = {"env": {}, "place": Place(0, 1, local_size=1), "host": "here", "root": ROOT}
    return Context(**{**given, **changes})


def member(rank: int, host: str, clock: float = 0.0, **changes) -> Member:
    same = {
        "python": "3.11 at /p",
        "packages": {"torch": "2.13.0"},
        "code": {"a.py": "1"},
        "variables": {},
        "root": "/r",
    }
    return Member(rank, host, {**same, **changes}, clock, 0.001)


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if finding.level != "fine"}


def test_a_check_that_hangs_or_crashes_is_a_finding_and_the_others_go_on(monkeypatch) -> None:
    def hangs(_: Context):
        yield fine("before", "said before it hung")
        threading.Event().wait(30)

    def crashes(_: Context):
        raise KeyError("no such key")

    def works(_: Context):
        yield fine("works", "")

    began = time.monotonic()
    found = run_checks(
        [Check("one", hangs, limit_seconds=0.3), Check("two", crashes), Check("three", works)], context()
    )
    assert time.monotonic() - began < 3
    assert [finding.name for finding in found] == ["before", "doctor.hangs", "doctor.failed", "works"]
    assert "'one' did not end within 0 s" in found[1].text and found[1].level == "error"
    assert "KeyError: 'no such key'" in found[2].text and "test_doctor.py" in found[2].text
    monkeypatch.setattr(checks, "ALL_SECONDS", 0.2)  # a rank that has many such checks still reports
    began = time.monotonic()
    run_checks([Check(str(number), hangs) for number in range(5)], context())
    assert time.monotonic() - began < 3


def test_whose_check_it_is() -> None:
    second = context(place=Place(1, 4, local_rank=1, local_size=2))
    on_other_host = context(place=Place(2, 4, local_rank=0, local_size=2))
    by = {whose: Check(whose, lambda _: [], whose) for whose in ("rank", "host", "job")}
    assert [by[whose].applies(second) for whose in by] == [True, False, False]
    assert [by[whose].applies(on_other_host) for whose in by] == [True, True, False]


def test_findings_of_ranks_that_say_the_same_become_one() -> None:
    said = [
        warning("w", "text", "cause", "advice").found_by(rank, host) for rank, host in ((0, "a"), (1, "a"), (2, "b"))
    ]
    other = warning("w", "another text", "cause", "advice").found_by(3, "b")
    merged = merge([*said, other])
    assert [(one.text, one.ranks, one.hosts) for one in merged] == [
        ("text", (0, 1, 2), ("a", "b")),
        ("another text", (3,), ("b",)),
    ]
    assert [from_json(one.to_json()) for one in merged] == merged


def test_differences_are_told_with_rank_and_host() -> None:
    ranks = [member(0, "a"), member(1, "a"), member(2, "b", packages={"torch": "2.11.0", "tqdm": "1"})]
    found = compare.compare(ranks)
    packages = [one for one in found if one.name == "ranks.package"]
    assert [(one.level, one.data["package"]) for one in packages] == [("error", "torch"), ("warning", "tqdm")]
    assert "2.13.0 (ranks 0-1 on a); 2.11.0 (rank 2 on b)" in packages[0].text

    ranks = [member(0, "a"), member(1, "b", code={"a.py": "2", "b.py": "3"}, root="/other")]
    code = named(compare.compare(ranks))["ranks.code"]
    assert "a.py, b.py" in code.text and code.level == "error" and "/other" in code.cause

    ranks = [member(0, "a", variables={"NCCL_IB_HCA": "mlx5"}), member(1, "b"), member(2, "b")]
    text = named(compare.compare(ranks))["ranks.variable"].text
    assert "(not set) (ranks 1-2 on b); mlx5 (rank 0 on a)" in text
    assert not named(compare.compare([member(0, "a"), member(1, "b")]))


@pytest.mark.parametrize(("seconds", "level"), [(0.4, "fine"), (-5.0, "warning"), (90.0, "error")])
def test_a_clock_that_is_wrong(seconds: float, level: str) -> None:
    found = list(compare.clocks([member(0, "a"), member(1, "b", seconds), member(2, "b", seconds)]))
    assert [one.level for one in found] == [level]
    if level != "fine":
        assert f"the clock of b is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'}" in found[0].text


def test_hosts_that_were_given_and_are_not_used() -> None:
    job = Allocation("SLURM", "7", ("n1", "n2.cluster", "n3"), (1, 1, 1), "SLURM_JOB_NODELIST")
    members = [member(0, "n1.cluster"), member(1, "n3")]
    (idle,) = compare.hosts_used(members, job, "torchrun")
    assert idle.level == "error" and idle.text.endswith("no rank runs on n2.cluster")
    (used,) = compare.hosts_used([*members, member(2, "n2")], job, "torchrun")
    assert used.level == "fine"


def test_secrets_are_compared_and_never_shown() -> None:
    shown = facts.variables({"HF_TOKEN": "hf_abc", "NCCL_DEBUG": "INFO", "HOME": "/h", "LD_LIBRARY_PATH": "/a:/a::/b"})
    assert shown == {
        "HF_TOKEN": shown["HF_TOKEN"],
        "NCCL_DEBUG": "INFO",
        "LD_LIBRARY_PATH": "/a:/b",
    }
    assert "hf_abc" not in shown["HF_TOKEN"]
    assert facts.variables({"HF_TOKEN": "hf_abd"})["HF_TOKEN"] != shown["HF_TOKEN"]


def a_gpu(**changes: str) -> gpus.Gpu:
    line = "0, GPU-1, NVIDIA H100 80GB HBM3, 81559, 4, 550.54.15, 0, 5, 16, 16, Default"
    (gpu,) = gpus.read_gpus(line)
    return gpus.Gpu({**gpu.values, **{name.replace("__", "."): value for name, value in changes.items()}})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, None),
        ({"ecc__errors__uncorrected__volatile__total": "[N/A]"}, None),
        ({"memory__used": "40000"}, "gpu.in_use"),
        ({"ecc__errors__uncorrected__volatile__total": "3"}, "gpu.ecc"),
        ({"pcie__link__width__current": "8"}, "gpu.pcie"),
        ({"compute_mode": "Prohibited"}, "gpu.compute_mode"),
    ],
)
def test_what_is_wrong_with_a_gpu(changes: dict[str, str], name: str | None) -> None:
    assert list(named(list(gpus._one(a_gpu(**changes))))) == ([] if name is None else [name])


def test_links_between_gpus() -> None:
    assert gpus.read_topology(TOPOLOGY) == ["NV18", "NV18", "SYS"]
    assert gpus.pcie_rate([a_gpu(), a_gpu(pcie__link__width__current="8")]) == pytest.approx(8 * 3.94)
    assert gpus.pcie_rate([a_gpu(pcie__link__gen__max="[N/A]")]) is None


def test_links_between_hosts(tmp_path: Path) -> None:
    for name, state, rate in (
        ("mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)"),
        ("mlx5_1", "1: DOWN", "40 Gb/sec (4X QDR)"),
    ):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text(f"{rate}\n")
    assert links.infiniband_ports(tmp_path) == {"mlx5_0:1": ("ACTIVE", 50.0), "mlx5_1:1": ("DOWN", 5.0)}


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ("sm_90", ["sm_80", "sm_90"], True),
        ("sm_86", ["sm_80"], True),
        ("sm_80", ["sm_86"], False),
        ("sm_120", ["sm_90", "sm_100"], False),
        ("sm_120", ["sm_90", "compute_90"], True),
        ("sm_70", ["sm_75", "compute_90"], False),
        ("sm_90", ["sm_90a"], True),
    ],
)
def test_which_builds_run_on_which_gpu(capability: str, archs: list[str], runs: bool) -> None:
    assert probe_findings.runs_on(capability, archs) is runs


def rows(bus: float, right: bool = True) -> list[dict]:
    names = ("all-reduce", "all-gather")
    sizes = (1024, 2**30)
    shared = {"seconds": 0.1, "algorithm_gb_per_second": bus, "bus_gb_per_second": bus, "right": right}
    return [{"collective": name, "num_bytes": size, **shared} for name in names for size in sizes]


@pytest.mark.parametrize(
    ("bus", "right", "link", "level", "name"),
    [
        (0.1, True, None, "fine", "bandwidth"),
        (400.0, True, ("NVLink", 450.0), "fine", "bandwidth"),
        (20.0, True, ("NVLink", 450.0), "warning", "bandwidth.slow"),
        (12.0, True, ("InfiniBand", 100.0), "warning", "bandwidth.slow"),
        (400.0, False, ("NVLink", 450.0), "error", "bandwidth.wrong"),
    ],
)
def test_bandwidth_against_its_link(bus: float, right: bool, link, level: str, name: str) -> None:
    (found,) = probe_findings.bandwidth_findings(rows(bus, right), 8, link)
    assert (found.level, found.name) == (level, name)


def result(**changes) -> dict:
    return {"phase": "start", "told": {}, "status": 1, "tail": [], **changes}


def test_of_ranks_that_fail_together_the_one_with_the_cause_is_told() -> None:
    failed = {"kind": "RuntimeError", "text": "no route to host", "phase": "bandwidth"}
    suffers = {"kind": "PeerFailure", "text": "Another rank failed.", "phase": "bandwidth"}
    results = {
        0: result(told={"failed": suffers}),
        1: result(phase="bandwidth", told={"failed": failed}),
        2: result(tail=["Another rank failed."]),
    }
    found = named(probe_findings.probe_findings(results, ["a", "b", "c"], {}, None))
    assert list(found) == ["probe.failed"] and found["probe.failed"].ranks == (1,)
    assert "no route to host" in found["probe.failed"].text


def stub_torch(tmp_path: Path, code: str) -> dict[str, str]:
    """An environment in which `import torch` does this."""
    (tmp_path / "torch.py").write_text(textwrap.dedent(code))
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_a_probe_that_hangs_is_ended_and_its_place_is_told(tmp_path: Path) -> None:
    env = stub_torch(
        tmp_path, "import os, time\nopen(f'{__file__}.pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    began = time.monotonic()
    hung = run_probe(env, ROOT, {**PHASE_SECONDS, "import": 3.0})
    assert hung.status is None and time.monotonic() - began < 20
    (finding,) = named(probe_findings.probe_findings({0: hung.to_json()}, ["a"], {}, None)).values()
    assert finding.name == "probe.hangs" and "'import'" in finding.text and "torch.py" in finding.text
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "torch.py.pid").read_text()), 0)


@pytest.mark.parametrize(
    ("code", "name", "says"),
    [
        (f"import os\nos.kill(os.getpid(), {int(signal.SIGKILL)})", "probe.killed", "out of memory"),
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "probe.failed", "libcudart.so.12"),
    ],
)
def test_a_probe_that_dies_is_told_with_its_cause(tmp_path: Path, code: str, name: str, says: str) -> None:
    died = run_probe(stub_torch(tmp_path, code), ROOT)
    (finding,) = named(probe_findings.probe_findings({0: died.to_json()}, ["a"], {}, None)).values()
    assert finding.name == name and says in finding.text + finding.cause


def test_the_worst_stands_last_and_no_line_is_too_wide() -> None:
    long = "word " * 60
    found = [error("e", long, long, long), fine("f", long), warning("w", long, long, long).found_by(1, "b")]
    report = Report(found, ["a", "b"], "mpirun", "now", 1.0, 0.0, {})
    page = ["".join(text for _, text in line) for line in lines(report, 80)]
    assert max(map(len, page)) <= 80
    order = [
        next(number for number, line in enumerate(page) if line.startswith(start))
        for start in ("  f", "WARNING", "ERROR")
    ]
    assert order == sorted(order)
    assert "rank 1 on b" in "\n".join(page) and page[-1] == "1 fine, 1 error, 1 warning; exit status 2"
    assert report.status == 2 and not has_errors(found[1:])


def test_one_check_cannot_be_waited_for_longer_than_its_limit() -> None:
    began = time.monotonic()
    run_one(Check("slow", lambda _: time.sleep(30) or []), context(), 0.2)
    assert time.monotonic() - began < 3


MAKERS = ("fine", "warning", "error", "make", "level")


def names_in_code() -> set[str]:
    """First arguments of what makes a finding, in the doctor's files."""
    found = set()
    for file in DOCTOR.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            makes = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MAKERS
            if makes and node.args:
                found |= {value.value for value in ast.walk(node.args[0]) if isinstance(value, ast.Constant)}
    return {name for name in found if isinstance(name, str) and re.fullmatch(r"[\w.]+", name)}


def test_every_finding_is_in_the_docs_and_no_other() -> None:
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE))
    assert len(told) > 60
    assert told == names_in_code()
