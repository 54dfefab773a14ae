"""From settings to a run that is ready to train: every check comes before the model is built."""

import os

import torch

from ds_recipes.checkpoint.load import Found
from ds_recipes.checkpoint.retention import EVALUATION
from ds_recipes.config.ds.effective import effective_ds_config
from ds_recipes.config.engine_settings import engine_settings
from ds_recipes.config.hang_settings import LOAD, START
from ds_recipes.config.plan import Plan, make_plan
from ds_recipes.config.schema import Config
from ds_recipes.data.skips import Skips
from ds_recipes.data.stream import Stream
from ds_recipes.engine.base import Engine
from ds_recipes.engine.checks import check_model
from ds_recipes.engine.create import check_device, create_engine
from ds_recipes.models.flops import count_flops
from ds_recipes.models.skeleton import tied_names
from ds_recipes.models.weight_decay import decayed_names
from ds_recipes.training.announce import announce_engine, announce_inputs
from ds_recipes.training.checksums import CHECKSUM_STEP, Checksums
from ds_recipes.training.environment import environment_of
from ds_recipes.training.guard import Guard
from ds_recipes.training.hurried import Hurried
from ds_recipes.training.identity import identity_of
from ds_recipes.training.inputs import Inputs, read_inputs, read_model
from ds_recipes.training.launch import Launch
from ds_recipes.training.meter import StepMeter, peak_flops
from ds_recipes.training.model_files import model_files
from ds_recipes.training.resume import (
    NO_DECAY,
    Now,
    Start,
    announce_start,
    find_start,
    leave_behind,
    load_start,
    read_start,
    skips_of,
)
from ds_recipes.training.room import check_room
from ds_recipes.training.run import Run
from ds_recipes.training.saving import ModelRecord, Saving
from ds_recipes.training.state import TrainingState
from ds_recipes.training.trackers.group import start_trackers


def prepare(config: Config, launch: Launch) -> Run | None:
    """Check the inputs, find where to begin, build the engine. None if the run's last step is already durable.

    Raises:
        ConfigError, InputError, CheckpointError: on every rank, and before the model is built wherever that is possible.
    """
    world = launch.world
    world.check("device", lambda: check_device(config, world.device))
    _set_determinism(config)
    world.doing("looking for checkpoints", LOAD)
    begin = find_start(config, launch.folder, world)
    found = begin.found
    world.doing("reading the model", START)
    model = read_model(config, world, found)
    inputs = read_inputs(config, world, model, launch.say)
    skips, late = skips_of(config, found)
    plan = make_plan(config, world.size, inputs.data.corpus.num_rows, skips.ranges)
    assert plan.total_steps is not None
    laid_out = make_plan(config, world.size, inputs.data.corpus.num_rows)
    identity = identity_of(config, laid_out, inputs.data, inputs.source.config_copy().to_dict())
    environment = environment_of(config, world, inputs.source)
    for line in late:
        launch.say(f"warning: {line}")
    trained = frozenset(name for name, tensor in inputs.skeleton.named_parameters() if tensor.requires_grad)
    spared = trained - decayed_names(inputs.skeleton)
    now = Now(trained, spared, identity, environment, inputs.data.corpus.files, plan)
    announce_start(config, begin, now, world, launch.say)
    if found is not None and found.manifest.step >= plan.total_steps:
        launch.nothing_to_do(found.manifest.step, found.path.name)
        return None
    leave_behind(begin, launch.folder, launch.attempt, world, launch.say)
    files = {}
    if world.rank == 0:
        files = model_files(inputs.source, inputs.skeleton, inputs.tokenizer, inputs.ends)
    first_step = found.manifest.step if found is not None else 0
    check_room(config, launch, inputs.shapes, files, first_step, plan.total_steps)
    start = read_start(inputs.source, found, world)
    announce_inputs(config, launch, plan, inputs)
    world.doing("building the engine", START)
    engine = create_engine(config, plan, inputs.source, world)
    launch.stop.leave_if_asked(world, "building the engine")
    world.doing("loading", LOAD)
    state = load_start(config, engine, Hurried(start, world.heard_stop), found, world)
    launch.stop.leave_if_asked(world, "loading")
    world.doing("the last checks", START)
    check_model(engine, inputs.source, world, config.run.precision, config.data.context_size, _advice(config, engine))
    launch.stop.leave_if_asked(world, "the last checks")
    world.heed(None)
    announce_engine(config, launch, engine, plan, state, found)
    if launch.record is not None:
        launch.record.write_ds_config(effective_ds_config(config, plan))
        launch.record.continues_from(state.step)
    return _assemble(config, launch, plan, inputs, engine, state, now, begin, skips, files)


def _assemble(
    config: Config,
    launch: Launch,
    plan: Plan,
    inputs: Inputs,
    engine: Engine,
    state: TrainingState,
    now: Now,
    begin: Start,
    skips: Skips,
    files: dict[str, bytes],
) -> Run:
    world, found = launch.world, begin.found
    device_name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    run = Run(
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
        stop=launch.stop,
        guard=Guard(
            config.guards,
            engine_settings(config).loss_scaling,
            found.state.get("guard") if found is not None else None,
        ),
        state=state,
        folder=launch.folder,
        identity=dict(now.identity),
        notes={"environment": dict(now.environment), "origin": begin.origin, NO_DECAY: sorted(now.spared)},
        attempt=launch.attempt,
    )
    run.checksums = Checksums(
        engine,
        world,
        config.guards.checksum_interval,
        lambda step: run.saves_after(step) or step == run.total_steps,
        found.state.get(CHECKSUM_STEP) if found is not None else None,
    )
    run.saving = _saving(run, launch, inputs, files, found)
    run.owes_evaluation = found is not None and run.saving.last_saved is not None and _owes_evaluation(run, found)
    return run


def _saving(run: Run, launch: Launch, inputs: Inputs, files: dict[str, bytes], found: Found | None) -> Saving:
    is_own = found is not None and found.path.parent.resolve() == launch.folder.resolve()

    def fence() -> None:
        launch.fence()
        run.checksums.fence()

    return Saving(
        run.config.checkpoint,
        launch.folder,
        launch.world,
        run.engine,
        run.trackers,
        ModelRecord(
            files=files,
            tied=tied_names(inputs.skeleton),
            vocabulary_size=inputs.source.vocabulary_size,
        ),
        record=run.record,
        attempt=launch.attempt,
        fence=fence,
        last_saved=found.path if found is not None and is_own else None,
    )


def _owes_evaluation(run: Run, found: Found) -> bool:
    """True if the evaluation after the step of `found` was due and was abandoned."""
    return run.evaluates_after(found.manifest.step) and found.state.get(EVALUATION, {}) is None


def _advice(config: Config, engine: Engine) -> str | None:
    """What to do if documents that share a row see each other; None if none share one."""
    if config.data.packing != "off":
        return "Use --packing off."
    if engine.attention.startswith("flash_attention"):  # which takes rows end to end
        return "Use --attn_implementation sdpa."
    return None


def _set_determinism(config: Config) -> None:
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's documentation of deterministic algorithms
        torch.use_deterministic_algorithms(True)
