"""Memory that a DeepSpeed JSON asks for: bytes a parameter on a rank's device, in host memory and on NVMe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_recipes.config.ds.combine import section

BYTES = {"fp32": 4, "float32": 4, "float": 4, "torch.float32": 4}
"""Bytes of the long number format; all others here have two."""

GIB = 2**30
BILLION = 10**9


@dataclass(frozen=True)
class Share:
    """One kind of state: bytes a parameter that one rank holds, by place."""

    what: str
    device: float = 0.0
    host: float = 0.0
    nvme: float = 0.0


@dataclass
class Memory:
    """The table and what is to be said about it. Activations, buckets and gathered blocks come on top."""

    world: int
    shares: list[Share] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def total(self, place: str) -> float:
        return float(sum(getattr(share, place) for share in self.shares))


def memory_of(tree: Mapping[str, Any], stage: int, engine: str, world: int) -> Memory:
    """Bytes a parameter at this number of ranks, with Adam and this program's defaults for what the file leaves open."""
    zero = section(tree, "zero_optimization")
    optimizer, parameters = _place(zero, "offload_optimizer"), _place(zero, "offload_param")
    if engine == "fsdp" and "host" in (optimizer, parameters):
        optimizer = parameters = "host"  # FSDP2 offloads both or none
    if stage < 3:
        parameters, optimizer = "device", "host" if optimizer == "nvme" and stage in (1, 2) else optimizer
    whole = world if stage >= 1 else 1
    half = _half(tree)
    is_low = half is not None and _is_on(section(tree, half), f"{half}_master_weights_and_grads")
    master = 2 if is_low else 4
    moments = 2 * (2 if is_low and _is_on(section(tree, "bf16"), "bf16_optimizer_states") else 4)
    gradient = BYTES.get(str(section(tree, "data_types").get("grad_accum_dtype", "fp32")), 2)
    memory = Memory(world)
    compute = 2 if half else 4
    kept = float(compute) if stage < 3 else compute / world if engine == "deepspeed" else 0.0
    if kept:
        memory.shares.append(_share("parameters", kept, parameters))
    group = _group(zero)
    if stage == 3 and group > 1 and engine == "deepspeed":
        memory.shares.append(Share("parameters, second copy (hpZ)", compute / min(group, world)))
    over = min(group, world) if engine == "fsdp" and stage == 3 and group > 1 else whole
    is_split = stage >= 2 or engine == "fsdp"
    memory.shares.append(
        _share("gradients", gradient / (over if is_split else 1), optimizer if stage >= 2 else "device")
    )
    memory.shares.append(_share("master weights", master / over, optimizer))
    memory.shares.append(_share("Adam's moments", moments / over, optimizer))
    memory.advice = list(_advice(memory, stage, engine, optimizer, parameters, world))
    return memory


def _share(what: str, number: float, place: str) -> Share:
    return Share(what, **{place: number})


def _place(zero: Mapping[str, Any], name: str) -> str:
    return {"cpu": "host", "nvme": "nvme"}.get(str(section(zero, name).get("device")), "device")


def _half(tree: Mapping[str, Any]) -> str | None:
    """bf16 or fp16 if one is on; bf16, this program's default, where the file leaves it open."""
    switches = {name: section(tree, name).get("enabled", "absent") for name in ("bf16", "fp16")}
    for name, switch in switches.items():
        if str(switch).lower() in ("true", "1"):
            return name
    is_off = section(tree, "torch_autocast").get("enabled") is True or str(switches["bf16"]).lower() == "false"
    return None if is_off else "bf16"


def _group(zero: Mapping[str, Any]) -> int:
    size = zero.get("zero_hpz_partition_size")
    return size if isinstance(size, int) and not isinstance(size, bool) else 1


def _is_on(section: Mapping[str, Any], name: str) -> bool:
    return section.get(name) is True


def _advice(memory: Memory, stage: int, engine: str, optimizer: str, parameters: str, world: int) -> Any:
    device, host = memory.total("device"), memory.total("host")
    if optimizer == "host":
        yield (
            f"the optimizer's state lies in host memory: {host:.3g} bytes a parameter and rank, "
            f"{host * 8 * BILLION / GIB:,.0f} GiB for 8 ranks of one node and 1e9 parameters"
        )
    if optimizer == "device" and stage in (1, 2) and engine == "deepspeed":
        saved = next(share.device for share in memory.shares if share.what == "parameters") * (1 - 1 / world)
        if saved > 0.3 * device:
            yield f"stage 3 would shard the parameters too, {saved:.3g} bytes a parameter less on every rank"
    if stage == 3 and parameters == "host" and optimizer == "device":
        yield "offload_param without offload_optimizer moves the smaller part: the optimizer's state is larger"
    if stage == 3 and world == 1:
        yield "one rank has nothing to shard: stage 3 only costs time there, unless it is for offload"
    if stage == 0:
        yield "stage 0 shards nothing: every rank holds all of it"
