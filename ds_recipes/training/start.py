"""From settings to a run that is ready to train: every check comes before the model is built."""

import os

import torch

from ds_recipes.checkpoint.load import Found
from ds_recipes.config.ds.effective import effective_ds_config
from ds_recipes.config.plan import Plan, make_plan
from ds_recipes.config.schema import Config
from ds_recipes.data.skips import Skips
from ds_recipes.data.stream import Stream
from ds_recipes.engine.base import Engine
from ds_recipes.engine.checks import check_isolation, check_loss_head
from ds_recipes.engine.create import check_device, create_engine
from ds_recipes.models.attention import choose_attention
from ds_recipes.models.flops import count_flops
from ds_recipes.models.skeleton import parameter_shapes, tied_names
from ds_recipes.training.announce import announce_engine, announce_inputs
from ds_recipes.training.identity import identity_of
from ds_recipes.training.inputs import Inputs, read_inputs
from ds_recipes.training.launch import Launch
from ds_recipes.training.meter import StepMeter, peak_flops
from ds_recipes.training.model_files import model_files
from ds_recipes.training.resume import check_continues, find_start, load_start, read_start, skips_of
from ds_recipes.training.run import Run
from ds_recipes.training.state import TrainingState
from ds_recipes.training.stop import StopRequest
from ds_recipes.training.trackers.group import start_trackers


def prepare(config: Config, launch: Launch) -> Run | None:
    """Check the inputs, find where to begin, build the engine. None if the run's last step is already durable.

    Raises:
        ConfigError, InputError, CheckpointError: on every rank, and before the model is built wherever that is possible.
    """
    world = launch.world
    world.check("device", lambda: check_device(config, world.device))
    _set_determinism(config)
    inputs = read_inputs(config, world, launch.say)
    found = find_start(config, launch.folder, world)
    skips, late = skips_of(config, found)
    plan = make_plan(config, world.size, inputs.data.corpus.num_rows, skips.ranges)
    assert plan.total_steps is not None
    identity = identity_of(config, plan, inputs.data)
    for line in late:
        launch.say(f"warning: {line}")
    if found is not None:
        for line in found.skipped:
            launch.say(f"warning: {line}")
        shapes = parameter_shapes(inputs.skeleton)
        changes = world.check(
            "resume", lambda: check_continues(config, found, shapes, identity, inputs.data.corpus.files)
        )
        for line in changes:
            launch.say(f"allowed: {line}")
        if found.manifest.step >= plan.total_steps:
            launch.nothing_to_do(found.manifest.step, found.path.name)
            return None
    start = read_start(inputs.source, found, world)
    announce_inputs(config, launch, plan, inputs)
    engine = create_engine(config, plan, inputs.source, world)
    state = load_start(config, engine, start, found, world)
    check_loss_head(engine, inputs.source.vocabulary_size, config.run.precision)
    attention = choose_attention(config, world.device)
    if config.data.packing != "off":
        check_isolation(engine, inputs.source, config.run.precision, "Use --packing off.")
    elif attention.startswith("flash_attention"):  # which takes a micro-batch's rows end to end
        check_isolation(engine, inputs.source, config.run.precision, "Use --attn_implementation sdpa.")
    announce_engine(launch, engine, plan, state, found)
    if launch.record is not None:
        launch.record.write_ds_config(effective_ds_config(config, plan))
        launch.record.continues_from(state.step)
    return _assemble(config, launch, plan, inputs, engine, state, identity, found, skips)


def _assemble(
    config: Config,
    launch: Launch,
    plan: Plan,
    inputs: Inputs,
    engine: Engine,
    state: TrainingState,
    identity: dict[str, str],
    found: Found | None,
    skips: Skips,
) -> Run:
    world = launch.world
    device_name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return Run(
        config=config,
        plan=plan,
        world=world,
        engine=engine,
        corpus=inputs.data.corpus,
        validation=inputs.data.validation,
        stream=Stream(
            inputs.data.corpus,
            plan,
            world.rank,
            position=state.position,
            data_hash=state.data_hash,
            num_workers=config.data.num_workers_dataloader,
            skips=skips,
        ),
        trackers=start_trackers(config, launch.folder, plan, world, state.step, launch.record),
        meter=StepMeter(
            plan, count_flops(inputs.skeleton), world.device, peak_flops(device_name, config.run.precision)
        ),
        stop=StopRequest(launch.folder, world.rank == 0, launch.started, config.checkpoint.stop_after),
        state=state,
        folder=launch.folder,
        identity=identity,
        model_files=model_files(inputs.source, inputs.skeleton, inputs.tokenizer) if world.rank == 0 else {},
        tied=tied_names(inputs.skeleton),
        vocabulary_size=inputs.source.vocabulary_size,
        last_saved=found.path if found is not None and found.path.parent == launch.folder else None,
    )


def _set_determinism(config: Config) -> None:
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's documentation of deterministic algorithms
        torch.use_deterministic_algorithms(True)
