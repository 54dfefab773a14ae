"""What the links between hosts are rated for: InfiniBand and Ethernet, from /sys."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from ds_recipes.cluster.doctor.checks import Check, Context
from ds_recipes.cluster.doctor.findings import Finding, error, fine, warning

INFINIBAND, NETWORK = Path("/sys/class/infiniband"), Path("/sys/class/net")


def links(context: Context) -> Iterator[Finding]:
    """Adapters and their rates, in 1e9 bytes a second."""
    ports = infiniband_ports(INFINIBAND)
    active = {name: rate for name, (state, rate) in ports.items() if state == "ACTIVE"}
    if active:
        rated = sum(active.values())
        text = ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in active.items())
        yield fine("links.infiniband", f"InfiniBand or RoCE: {text}", kind="InfiniBand", rated_gb_per_second=rated)
    for name, (state, _) in ports.items():
        if active and state != "ACTIVE":
            yield warning(
                "links.port_down",
                f"the adapter port {name} is {state}",
                "no cable, a switch port that is off, or no subnet manager",
                "If its sisters on other hosts are active, tell the administrator (ibstat); NCCL uses only those that are.",
            )
    wanted = context.env.get("NCCL_IB_HCA", "").lstrip("^=").split(",")
    unknown = [name for name in wanted if name and not any(port.startswith(name.split(":")[0]) for port in ports)]
    if unknown:
        yield error(
            "links.unknown_adapter",
            f"NCCL_IB_HCA names {', '.join(unknown)}; there are {', '.join(ports) or 'none'}",
            "the variable was copied from another cluster",
            "Unset it, or name adapters of this host (ls /sys/class/infiniband).",
        )
    speeds = ethernet_speeds(NETWORK)
    if speeds:
        text = ", ".join(f"{name} {speed * 8:.0f} Gb/s" for name, speed in speeds.items())
        yield fine("links.ethernet", f"Ethernet: {text}", rated_gb_per_second=max(speeds.values()))


def infiniband_ports(folder: Path) -> dict[str, tuple[str, float]]:
    """State and rate (GB/s) of each port, by `adapter:port`."""
    found = {}
    for port in sorted(folder.glob("*/ports/*")):
        state = (port / "state").read_text(encoding="ascii").split(":")[-1].strip()
        rate = re.match(r"([\d.]+) Gb/sec", (port / "rate").read_text(encoding="ascii"))
        found[f"{port.parent.parent.name}:{port.name}"] = (state, float(rate[1]) / 8 if rate else 0.0)
    return found


def ethernet_speeds(folder: Path) -> dict[str, float]:
    """Rate (GB/s) of each interface that knows its own; virtual ones give none, or a made-up one."""
    found = {}
    for interface in sorted(folder.glob("*")):
        with contextlib.suppress(OSError, ValueError):  # an interface that is down answers with an error
            megabits = int((interface / "speed").read_text(encoding="ascii"))
            if megabits > 0 and (interface / "device").exists():
                found[interface.name] = megabits / 8000
    return found


CHECKS = (Check("links", links, "host"),)
