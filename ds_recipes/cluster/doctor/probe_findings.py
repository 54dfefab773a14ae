"""What the probes of all ranks mean: builds against GPUs, bandwidth against the link, the step's loss, failures by phase."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds_recipes.cluster.doctor.findings import Finding, counted, error, fine, warning

Results = Mapping[int, Mapping[str, Any]]
"""A probe's `Result`, as JSON, by rank."""

SHARE_OF_LINK = {"NVLink": 0.5, "InfiniBand": 0.4, "PCIe": 0.3}
"""Of a link's rate that an all-reduce of the largest size reaches at least on healthy machines; below it something is wrong."""

WHERE = {
    "import": ("torch or DeepSpeed cannot be loaded", "Look at the message; install them again in this environment."),
    "start": (
        "the ranks do not find each other, or cannot connect",
        "See the findings on names, interfaces and ports; look at firewalls between the hosts.",
    ),
    "bandwidth": (
        "a collective failed or hung: an interface or adapter that only some ranks can use, a firewall, a broken link",
        "Run again with NCCL_DEBUG=INFO; try NCCL_IB_DISABLE=1, then another NCCL_SOCKET_IFNAME.",
    ),
    "step": (
        "the engine failed",
        "Look at the message; tools/compare_engines.py tells whether the other engine works.",
    ),
    "end": ("a rank did not leave in order", "Look at the message; a rank that is killed at its end fails the job."),
}


def probe_findings(
    results: Results, hosts: Sequence[str], num_gpus: Mapping[str, int], link: tuple[str, float] | None
) -> list[Finding]:
    """All of it. `num_gpus` are those that the driver knows, by host; `link` is the slowest kind of link with its GB/s."""
    found: list[Finding] = []
    for rank, result in results.items():
        for finding in _about_torch(result["told"], num_gpus.get(hosts[rank], 0)):
            found.append(finding.found_by(rank, hosts[rank]))
    found += _failures(results, hosts)
    told = results[0]["told"] if 0 in results else {}
    if "bandwidth" in told:
        found += bandwidth_findings(told["bandwidth"], len(hosts), link)
    if "step" in told:
        found.append(_step(told["step"], len(hosts)))
    processes = [result["told"]["process"] for result in results.values() if "process" in result["told"]]
    if processes:
        files, peak = (max(process[name] for process in processes) for name in ("open_files", "peak_bytes"))
        text = f"a rank with a tiny model holds {files} files open and needs {peak / 2**30:.1f} GiB of host memory"
        found.append(fine("process", text, open_files=files, peak_bytes=peak))
    return found


def _about_torch(told: Mapping[str, Any], num_gpus: int) -> Iterator[Finding]:
    torch, deepspeed = told.get("torch"), told.get("deepspeed")
    if torch is not None:
        build = (
            f"CUDA {torch['cuda']}, NCCL {torch['nccl']}, for {' '.join(torch['archs'])}"
            if torch["cuda"]
            else "a CPU build"
        )
        yield fine("torch", f"torch {torch['version']}: {build}")
        if num_gpus and not torch["available"]:
            yield error(
                "torch.no_gpu",
                f"the driver knows {counted(num_gpus, 'GPU')}, and torch can use none: {torch['reason'] or build}",
                "torch is a CPU build"
                if not torch["cuda"]
                else "the driver is too old for this build, or the GPUs are hidden",
                "Install the CUDA build of torch (pytorch.org), or look at CUDA_VISIBLE_DEVICES and the driver.",
            )
        for gpu in torch["gpus"]:
            if not runs_on(gpu["capability"], torch["archs"]):
                yield error(
                    "torch.arch",
                    f"torch was built for {' '.join(torch['archs'])}, and {gpu['name']} is {gpu['capability']}",
                    "this build of torch is newer or older than the GPU",
                    "Install a build of torch that has this architecture.",
                )
    if deepspeed is not None:
        built = ", ".join(deepspeed["installed"]) or "none"
        yield fine(
            "deepspeed.ops",
            f"DeepSpeed {deepspeed['version']}: operators built at installation: {built}; "
            f"can be compiled here when they are used: {', '.join(deepspeed['compatible']) or 'none'}",
        )
        yield from _deepspeed_build(torch, deepspeed)


def _deepspeed_build(torch: Mapping[str, Any] | None, deepspeed: Mapping[str, Any]) -> Iterator[Finding]:
    """Operators that were built at installation belong to one torch."""
    theirs = str(deepspeed["built_for_torch"] or "0.0")
    if torch is None or not deepspeed["installed"] or theirs == "0.0":
        return
    if not str(torch["version"]).startswith(theirs):
        yield error(
            "deepspeed.built_for",
            f"DeepSpeed's operators ({', '.join(deepspeed['installed'])}) were built "
            f"for torch {theirs}, and torch is {torch['version']}",
            "torch was changed after DeepSpeed had been installed",
            "Install DeepSpeed again with the same DS_BUILD_* variables: pip install --no-cache-dir --force-reinstall deepspeed.",
        )


def runs_on(capability: str, archs: Sequence[str]) -> bool:
    """True if code for one of `archs` runs on a GPU of this capability: the same major number, or PTX of an older one."""
    match = re.match(r"sm_(\d+)(\d)", capability)
    if match is None or not archs:
        return True
    major, minor = int(match[1]), int(match[2])
    for arch in archs:
        built = re.match(r"(sm|compute)_(\d+)(\d)", arch)
        if built is None:
            continue
        kind, (their_major, their_minor) = built[1], (int(built[2]), int(built[3]))
        if (their_major == major and their_minor <= minor) or (
            kind == "compute" and (their_major, their_minor) <= (major, minor)
        ):
            return True
    return False


def _failures(results: Results, hosts: Sequence[str]) -> Iterator[Finding]:
    """The ranks that failed by themselves; of those that only heard of it nothing is said."""
    failed = {rank: result for rank, result in results.items() if result["status"] != 0}
    own = {rank: result for rank, result in failed.items() if not _only_suffers(result)}
    for rank, result in (own or failed).items():
        yield _failure(result).found_by(rank, hosts[rank])


def _only_suffers(result: Mapping[str, Any]) -> bool:
    told = result["told"].get("failed")
    return (
        told["kind"] in ("PeerFailure", "StartError")
        if told
        else any("Another rank failed" in line for line in result["tail"])
    )


def _failure(result: Mapping[str, Any]) -> Finding:
    phase, told, status = result["phase"], result["told"].get("failed"), result["status"]
    cause, advice = WHERE[phase]
    data = {"phase": phase, "status": status, "output": result["tail"]}
    if told is not None:
        return error(
            "probe.failed", f"the trial run failed in its phase '{phase}': {told['text']}", cause, advice, **data
        )
    if status is None:
        stack = [line.strip() for line in result["tail"] if line.strip().startswith("File ")]
        at = f"; it stood at {stack[0]}" if stack else ""
        return error(
            "probe.hangs", f"the trial run hung in its phase '{phase}' and was ended{at}", cause, advice, **data
        )
    if status < 0:
        memory = status == -9
        return error(
            "probe.killed",
            f"the trial run was ended by signal {-status} in its phase '{phase}'",
            "out of memory, most likely: the kernel or the batch system kills so"
            if memory
            else f"a crash in a library; {cause}",
            "See dmesg and the memory findings." if memory else advice,
            **data,
        )
    last = result["tail"][-1] if result["tail"] else f"status {status}"
    return error("probe.failed", f"the trial run failed in its phase '{phase}': {last}", cause, advice, **data)


def bandwidth_findings(rows: Sequence[Mapping[str, Any]], ranks: int, link: tuple[str, float] | None) -> list[Finding]:
    """The largest all-reduce against the link. `link`: see `probe_findings`."""
    wrong = [row for row in rows if not row["right"]]
    if wrong:
        sizes = ", ".join(f"{row['collective']} of {row['num_bytes']} bytes" for row in wrong)
        return [
            error(
                "bandwidth.wrong",
                f"wrong results between the ranks: {sizes}",
                "a broken link, adapter or GPU, or a defect of the communication library",
                "Find the host by running the doctor on halves of them; leave it out, and tell its administrator.",
                rows=list(rows),
            )
        ]
    best = max((row for row in rows if row["collective"] == "all-reduce"), key=lambda row: float(row["num_bytes"]))
    reached = float(best["bus_gb_per_second"])
    text = f"all-reduce of {best['num_bytes'] / 2**20:.0f} MiB over {counted(ranks, 'rank')}: {reached:.2f} GB/s on the bus"
    if link is None:
        return [fine("bandwidth", f"{text} (no link to hold it against: only reported)", rows=list(rows))]
    kind, rated = link
    text = f"{text}, of {rated:.0f} GB/s that {kind} is rated for"
    if reached < SHARE_OF_LINK[kind] * rated:
        return [
            warning(
                "bandwidth.slow",
                text,
                f"NCCL does not use {kind} (another interface, IB turned off, GPUdirect missing), or the link is shared or broken",
                "Run again with NCCL_DEBUG=INFO and see which transport it takes; unset NCCL_IB_DISABLE and NCCL_P2P_DISABLE.",
                rows=list(rows),
                rated_gb_per_second=rated,
            )
        ]
    return [fine("bandwidth", text, rows=list(rows), rated_gb_per_second=rated)]


def _step(step: Mapping[str, Any], ranks: int) -> Finding:
    text = (
        f"one ZeRO-3 step on {counted(ranks, 'rank')}: loss {step['loss_before']:.5f} -> {step['loss_after']:.5f}, "
        f"plain torch {step['expected_before']:.5f} -> {step['expected_after']:.5f}"
    )
    if step["right"]:
        return fine("step", f"{text}, {step['seconds']:.2f} s", **step)
    return error(
        "step.wrong",
        f"{text}; gradient norm {step['gradient_norm']:.5f}, plain torch {step['expected_norm']:.5f}",
        "ranks do not sum their gradients rightly: a library that was not tested with this project, or broken hardware",
        "Compare the versions with pyproject.toml; run tools/compare_engines.py; run the doctor on halves of the hosts.",
        **step,
    )
