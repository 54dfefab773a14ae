"""What a run may change freely between two launches, and a checkpoint records all the same: it can move the last bits."""

from pathlib import Path

from ds_recipes.config.engine_settings import engine_settings
from ds_recipes.config.schema import Config
from ds_recipes.models.attention import choose_attention
from ds_recipes.models.load import ModelSource
from ds_recipes.training.run_record import git_state, versions
from ds_recipes.world.group import World

SHOWN_HOSTS = 4


def environment_of(config: Config, world: World, source: ModelSource) -> dict[str, str]:
    """Versions, code, engine, sharding, ranks, attention and hosts, by name. Every rank must call it."""
    found = versions() | _code() if world.rank == 0 else None
    sharding = engine_settings(config).sharding
    hosts = list(dict.fromkeys(world.hosts))
    more = [f"and {len(hosts) - SHOWN_HOSTS} more"] if len(hosts) > SHOWN_HOSTS else []
    return (world.broadcast(found) or {}) | {
        "engine": config.run.engine,
        "stage": str(sharding.stage),
        "optimizer on": sharding.optimizer_on,
        "parameters on": sharding.parameters_on,
        "ranks": str(world.size),
        "attention": choose_attention(config, world.device, source),
        "hosts": " ".join(hosts[:SHOWN_HOSTS] + more),
    }


def _code() -> dict[str, str]:
    state = git_state(Path(__file__).parent)
    return {} if state is None else {"code": f"{state['commit'][:12]}{' with changes' if state['changed'] else ''}"}
