"""How much memory a process of this host may still take: the kernel's estimate, or what its control group leaves."""

from pathlib import Path

MEMORY_INFO = Path("/proc/meminfo")
OWN_GROUP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes that can be taken without swapping; 0 where nothing tells it."""
    try:
        lines = MEMORY_INFO.read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
    return min([free, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What each control group (version 2) around this process leaves it; page cache counts as free."""
    try:
        own = next(line[3:] for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    left = []
    for part in (own, *(str(parent) for parent in Path(own).parents)):
        group = GROUPS / part.lstrip("/")
        try:
            most = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            cache = next(
                int(line.split()[1])
                for line in (group / "memory.stat").read_text().splitlines()
                if line.startswith("inactive_file ")
            )
        except (OSError, StopIteration, ValueError):
            continue
        if most != "max":
            left.append(max(0, int(most) - used + cache))
    return left
