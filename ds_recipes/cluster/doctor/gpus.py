"""GPUs as the driver sees them, asked through nvidia-smi, so that a broken torch does not hide them."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.cluster.doctor.checks import Check, Context
from ds_recipes.cluster.doctor.commands import ask
from ds_recipes.cluster.doctor.facts import packages
from ds_recipes.cluster.doctor.findings import Finding, counted, error, fine, warning

FIELDS = (
    "index",
    "uuid",
    "name",
    "memory.total",
    "memory.used",
    "driver_version",
    "ecc.errors.uncorrected.volatile.total",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "compute_mode",
)
USED_MIB = 1024
"""A driver without a process on it holds less than this; above it somebody else is there."""

NVLINK_GB_PER_SECOND = 25.0
"""Of one link, each way, third and fourth generation (NVIDIA: A100 has 600 GB/s over 12 links, H100 900 over 18, both ways)."""

PCIE_GB_PER_SECOND_A_LANE = {3: 0.985, 4: 1.97, 5: 3.94, 6: 7.56}
"""By generation, each way (PCI-SIG: 8, 16, 32 and 64 GT/s, less the encoding)."""

LEAST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""Driver for Linux by CUDA's major version (CUDA Compatibility, "Minor Version Compatibility")."""


@dataclass(frozen=True)
class Gpu:
    """One GPU's line; what the driver does not know is "[N/A]"."""

    values: Mapping[str, str]

    def number(self, field: str) -> int | None:
        match = re.match(r"\d+", self.values[field])
        return int(match[0]) if match else None

    @property
    def label(self) -> str:
        return f"GPU {self.values['index']} ({self.values['name']})"


def read_gpus(text: str) -> list[Gpu]:
    """The lines of `nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits`."""
    rows = [[value.strip() for value in line.split(",")] for line in text.splitlines() if line.strip()]
    return [Gpu(dict(zip(FIELDS, row, strict=True))) for row in rows if len(row) == len(FIELDS)]


def gpus(context: Context) -> Iterator[Finding]:
    """Their number, memory, errors and who else is on them."""
    devices = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    program = shutil.which("nvidia-smi", path=context.env.get("PATH"))
    if program is None:
        if devices:
            yield warning(
                "gpu.no_tool",
                f"/dev has {', '.join(devices)}, but there is no nvidia-smi on the PATH",
                "the driver's programs are not in this container, or not on the PATH",
                "Start the container with the driver's utilities (NVIDIA_DRIVER_CAPABILITIES=all), or add them to PATH.",
            )
        else:
            yield fine(
                "gpu.none", "no GPU on this host (no nvidia-smi, no /dev/nvidia*): ranks train on the CPU with gloo"
            )
        return
    answer = ask([program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"], 20)
    found = read_gpus(answer.output) if answer.good else []
    if not found:
        yield error(
            "gpu.driver",
            f"nvidia-smi gives no GPU: {answer.reason}",
            "the driver is not loaded, is of another version than its library, or a GPU has fallen off the bus",
            "See dmesg for 'NVRM' and 'Xid'; the host needs its driver loaded again, or a restart.",
        )
        return
    names = ", ".join(sorted({f"{gpu.values['name']}, {gpu.number('memory.total')} MiB" for gpu in found}))
    yield fine(
        "gpu", f"{counted(len(found), 'GPU')}: {names}; driver {found[0].values['driver_version']}", count=len(found)
    )
    for gpu in found:
        yield from _one(gpu)
    yield from _driver(found[0].values["driver_version"])
    yield from _visible(context, found)
    yield from _topology(program, found)


def _one(gpu: Gpu) -> Iterator[Finding]:
    used, errors = gpu.number("memory.used"), gpu.number("ecc.errors.uncorrected.volatile.total")
    if used is not None and used > USED_MIB:
        yield warning(
            "gpu.in_use",
            f"{gpu.label}: {used} of {gpu.number('memory.total')} MiB are in use",
            "another job on this host, or ranks that are left of one that was killed",
            "See who it is with nvidia-smi, and end it if it is yours; else ask for whole hosts.",
            used_mib=used,
        )
    if errors:
        yield error(
            "gpu.ecc",
            f"{gpu.label}: {counted(errors, 'uncorrected memory error')} since the driver was loaded",
            "failing memory of the GPU",
            "Leave this host out (--exclude), and tell its administrator: it needs a reset, or a new GPU.",
        )
    width, most = gpu.number("pcie.link.width.current"), gpu.number("pcie.link.width.max")
    if width and most and width < most:
        yield warning(
            "gpu.pcie",
            f"{gpu.label}: its PCIe link runs with {width} of {most} lanes",
            "a badly seated card, or a slot with fewer lanes",
            "Tell the administrator: copies between host and GPU take longer by that factor.",
        )
    if gpu.values["compute_mode"] in ("Prohibited", "Exclusive_Process"):
        level = error if gpu.values["compute_mode"] == "Prohibited" else warning
        yield level(
            "gpu.compute_mode",
            f"{gpu.label}: its compute mode is {gpu.values['compute_mode']}",
            "the administrator has set it so: one process a GPU, or none",
            "Start one rank a GPU and nothing else on it, or have it set to Default.",
        )


def _driver(text: str) -> Iterator[Finding]:
    """The driver against the CUDA that torch's wheel was built for, by its local version or its packages."""
    found = packages()
    cuda = re.search(r"\+cu(\d\d)\d", found.get("torch", ""))
    major = (
        int(cuda[1])
        if cuda
        else next((number for number in (13, 12, 11) if f"nvidia-cuda-runtime-cu{number}" in found), None)
    )
    driver = tuple(int(part) for part in re.findall(r"\d+", text)[:2])
    if major in LEAST_DRIVER and driver < LEAST_DRIVER[major]:
        yield error(
            "gpu.driver_old",
            f"driver {text} is too old for the CUDA {major} of torch {found['torch']}",
            "torch was installed for a newer driver than this host has",
            f"Install a torch for an older CUDA (pytorch.org, 'previous versions'), or a driver from "
            f"{'.'.join(map(str, LEAST_DRIVER[major]))} on.",
        )


def _visible(context: Context, found: Sequence[Gpu]) -> Iterator[Finding]:
    ranks = context.place.local_size
    chosen = context.env.get("CUDA_VISIBLE_DEVICES")
    count = len(found) if chosen is None else len([one for one in chosen.split(",") if one.strip() not in ("", "-1")])
    if chosen is not None and count == 0:
        yield error(
            "gpu.hidden",
            f"CUDA_VISIBLE_DEVICES={chosen!r} hides all {len(found)} GPUs",
            "the variable is left from another job, or the batch system gave no GPU to this one",
            "Unset it, or ask the batch system for GPUs (--gres=gpu:8, -l select=...:ngpus=8, rt_F).",
        )
    elif ranks and count > 1 and ranks > count:
        yield error(
            "gpu.too_few",
            f"{counted(ranks, 'rank')} on this host, and {counted(count, 'GPU')} for them",
            "the launcher was told more slots than there are GPUs",
            f"Set slots={count} in the hostfile (mpirun -npernode {count}, torchrun --nproc_per_node {count}).",
        )


def _topology(program: str, found: Sequence[Gpu]) -> Iterator[Finding]:
    if len(found) < 2:
        return
    answer = ask([program, "topo", "-m"], 20)
    if not answer.good:
        return
    links = read_topology(answer.output)
    if not links:
        return
    nvlinks = [int(kind[2:]) for kind in links if kind.startswith("NV")]
    missing = len(links) - len(nvlinks)
    if nvlinks and missing:
        yield warning(
            "gpu.nvlink",
            f"{missing} of {len(links)} pairs of GPUs have no NVLink between them, the others have",
            "a bridge that is missing, a GPU whose links are down, or a host made so",
            "See 'nvidia-smi topo -m' and 'nvidia-smi nvlink -s'; tell the administrator if its sister hosts have all.",
        )
    kind, rated = ("PCIe", pcie_rate(found)) if missing else ("NVLink", min(nvlinks) * NVLINK_GB_PER_SECOND)
    shown = f", {kind} rated for {rated:.0f} GB/s each way" if rated else ""
    yield fine(
        "gpu.links", f"between GPUs: {', '.join(sorted(set(links)))}{shown}", kind=kind, rated_gb_per_second=rated
    )


def pcie_rate(found: Sequence[Gpu]) -> float | None:
    """GB/s each way of the slowest GPU's PCIe link; None where the driver does not know."""
    rates = [
        PCIE_GB_PER_SECOND_A_LANE.get(gpu.number("pcie.link.gen.max") or 0, 0.0)
        * (gpu.number("pcie.link.width.current") or 0)
        for gpu in found
    ]
    return min(rates) or None


def read_topology(text: str) -> list[str]:
    """How each pair of GPUs is linked, from the matrix of `nvidia-smi topo -m`: NV18, PIX, PXB, PHB, NODE or SYS."""
    rows = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in text.splitlines()]
    rows = [
        row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and len(row) > 1 and not row[1].startswith("GPU")
    ]
    return [row[1 + column] for number, row in enumerate(rows) for column in range(number) if len(row) > 1 + column]


CHECKS = (Check("GPUs", gpus, "host", 45),)
