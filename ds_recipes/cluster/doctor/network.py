"""Names, interfaces and ports: what ranks need to find each other, and the traps on the way."""

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from ds_recipes.cluster.doctor.checks import Check, Context
from ds_recipes.cluster.doctor.findings import Finding, counted, error, fine, warning
from ds_recipes.cluster.ports import is_free, is_here
from ds_recipes.errors import WorldError
from ds_recipes.world.allocation import read_allocation
from ds_recipes.world.socket_owner import describe_owner

SIOCGIFADDR = 0x8915  # netdevice(7)
DEFAULT_PORT = 29500
SHOWN_NAMES = 8


def addresses_of(name: str) -> list[str]:
    """The addresses that a name leads to, IPv4 first; empty if it leads nowhere."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(
        dict.fromkeys(str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET))
    )


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def interfaces() -> dict[str, str | None]:
    """This host's network interfaces by name, each with its IPv4 address; None without one."""
    found: dict[str, str | None] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name[:15].encode())
            try:
                answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(answer[20:24])
            except OSError:
                found[name] = None
    return found


def own_name(context: Context) -> Iterator[Finding]:
    """Where this host's own name leads: gloo listens there."""
    addresses = addresses_of(context.host)
    several = not context.alone and not context.one_host
    chosen = context.env.get("GLOO_SOCKET_IFNAME")
    level = error if several and not chosen else warning
    choose = "or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface (see `ip -br address`) on all hosts."
    if not addresses:
        yield level(
            "name.own",
            f"the host's own name {context.host} leads to no address",
            "it is neither in /etc/hosts nor known to the name server",
            f"Add a line for it to /etc/hosts, {choose}",
        )
    elif all(map(is_loopback, addresses)):
        if several and not chosen:
            yield error(
                "name.loopback",
                f"the host's own name {context.host} leads to {addresses[0]}, which other hosts cannot reach",
                "a line of /etc/hosts, as Debian writes it; gloo would listen there and hang for minutes",
                f"Take the name out of that line, {choose}",
            )
        else:
            yield fine("name.own", f"{context.host} leads to {addresses[0]} (enough on one host)")
    elif not any(map(is_here, addresses)):
        yield level(
            "name.foreign",
            f"the host's own name {context.host} leads to {', '.join(addresses)}, which is no address of this host",
            "an old line of /etc/hosts, or an old entry of the name server",
            f"Correct the entry, {choose}",
        )
    else:
        yield fine("name.own", f"{context.host} is {addresses[0]}")


def other_names(context: Context) -> Iterator[Finding]:
    """Where the names of the other hosts lead: rank 0's, and those of the batch system."""
    names: dict[str, str] = {}
    if context.place.address and not _is_address(context.place.address):
        names[context.place.address] = "rank 0's host (MASTER_ADDR)"
    try:
        allocation = read_allocation(context.env)
    except WorldError as problem:
        yield error("job.hosts", str(problem), "the batch system's file of hosts", "Ask the administrator.")
        return
    for host in allocation.hosts if allocation else ():
        names.setdefault(host, f"in {allocation.source}" if allocation else "")
    unknown = [f"{name} ({why})" for name, why in names.items() if not addresses_of(name)]
    if unknown:
        yield error(
            "name.unknown",
            f"{context.host} finds no address for {', '.join(unknown[:SHOWN_NAMES])}",
            "a misspelt name, or one that is neither in this host's /etc/hosts nor known to its name server",
            "Correct it, or use addresses; 'getent hosts NAME' must answer on every host.",
            names=[name for name in names if not addresses_of(name)],
        )
    elif names:
        yield fine(
            "name.others", f"{counted(len(names), 'name')} of hosts found: {', '.join(list(names)[:SHOWN_NAMES])}"
        )


def chosen_interfaces(context: Context) -> Iterator[Finding]:
    """The variables that choose a network interface, against those that there are."""
    there = interfaces()
    several = not context.alone and not context.one_host
    shown = _listed(there)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        value = context.env.get(variable)
        if value is None:
            continue
        wanted = _wanted(variable, value, list(there))
        if not wanted:
            yield error(
                "interface.missing",
                f"{variable}={value} names no interface of {context.host}; there are {shown}",
                "interfaces are named differently on this host, or the variable was copied from another cluster",
                f"Set {variable} to one of them, or unset it where the host's own name leads to the right address.",
                variable=variable,
                value=value,
                interfaces=list(there),
            )
            continue
        for name in wanted:
            if not _is_up(name):
                yield error(
                    "interface.down",
                    f"{variable}={value}: the interface {name} of {context.host} is down",
                    "its cable, its driver, or it was never brought up",
                    f"Name another one ({shown}), or bring it up (ip link set {name} up).",
                    variable=variable,
                )
        if several and all(name.startswith("lo") for name in wanted):
            yield error(
                "interface.loopback",
                f"{variable}={value} means this host itself, and the ranks are on several hosts",
                "the variable was set for a test on one host",
                f"Set it to the interface between the hosts: {shown}.",
                variable=variable,
            )
    yield fine("interfaces", shown)


def rank_zero(context: Context) -> Iterator[Finding]:
    """Where rank 0 is to listen: its address and its port. Only rank 0 can tell."""
    place, env = context.place, context.env
    if context.alone:
        yield from _port_for_later(context)
        return
    if place.address is None or place.port is None or place.hosted:
        return
    if not is_here(place.address):
        yield error(
            "master.address",
            f"MASTER_ADDR={place.address} is no address of {context.host}, where rank 0 runs",
            "the first host of the hostfile is not where the launcher put rank 0, or the variable is left from another job",
            "Set MASTER_ADDR to rank 0's host, or unset it.",
        )
    if not is_free(place.port):
        yield _in_use(place.port, context)
    else:
        given = "MASTER_PORT" if env.get("MASTER_PORT") else "derived from the job"
        yield fine("port", f"rank 0 can listen at port {place.port} ({given}) of {context.host}")


def _port_for_later(context: Context) -> Iterator[Finding]:
    """Alone: the port that a launch from this shell would take."""
    text = context.env.get("MASTER_PORT", "")
    if text and not text.isdigit():
        yield error(
            "port.wrong",
            f"MASTER_PORT={text!r} is no number",
            "a typing error",
            "Set it to a free port, such as 29500.",
        )
    elif text and not is_free(int(text)):
        yield _in_use(int(text), context)
    elif not text and not is_free(DEFAULT_PORT):
        yield warning(
            "port.default_in_use",
            f"port {DEFAULT_PORT} of {context.host} is in use by {describe_owner(DEFAULT_PORT)}",
            "another job on this host: it is the default of deepspeed and torchrun",
            "Give the launcher --master_port with a free one (torchrun: --rdzv_endpoint localhost:0).",
        )
    else:
        yield fine("port", f"port {text or DEFAULT_PORT} is free for rank 0")


def _in_use(port: int, context: Context) -> Finding:
    return error(
        "port.in_use",
        f"rank 0 cannot listen at port {port} of {context.host}: it is in use by {describe_owner(port)}",
        "another job on this host, or ranks that are left of one that was killed",
        "Set MASTER_PORT (deepspeed --master_port, torchrun --master_port) to a free one, or end that process.",
        port=port,
    )


def _wanted(variable: str, value: str, there: list[str]) -> list[str]:
    """The interfaces that a variable means. NCCL takes prefixes, '=' for whole names and '^' for all but these."""
    if variable != "NCCL_SOCKET_IFNAME":
        names = value.split(",")
        return names if all(name in there for name in names) else []
    exclude, exact = value.startswith("^"), "=" in value[:2]
    names = value.lstrip("^=").split(",")
    matched = [name for name in there if any(name == one if exact else name.startswith(one) for one in names)]
    return [name for name in there if name not in matched and not name.startswith("lo")] if exclude else matched


def _is_up(name: str) -> bool:
    flags = Path(f"/sys/class/net/{name}/flags")
    return not flags.exists() or bool(int(flags.read_text(encoding="ascii"), 16) & 1)  # IFF_UP


def _listed(there: Mapping[str, str | None]) -> str:
    """Those with an address; bridges and the like are counted only."""
    told = [f"{name} {address}{_state(name)}" for name, address in there.items() if address is not None]
    others = len(there) - len(told)
    return ", ".join([*told, *([f"{others} without IPv4"] if others else [])])


def _state(name: str) -> str:
    return "" if _is_up(name) else " (down)"


CHECKS = (
    Check("own name", own_name, "host"),
    Check("other names", other_names, "host", 20),
    Check("interfaces", chosen_interfaces, "rank"),
    Check("rank 0", rank_zero, "job"),
)
