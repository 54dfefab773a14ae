"""What must hold between settings. Each rule looks at a draft and says what is wrong with it in one line, or nothing."""

from collections.abc import Callable, Iterator

from ds_recipes.config.checkpoint_settings import RESUME_WORDS
from ds_recipes.config.data_rules import DATA_RULES
from ds_recipes.config.draft import Draft
from ds_recipes.config.guard_rules import GUARD_RULES
from ds_recipes.config.hang_rules import HANG_RULES


def check_rules(draft: Draft) -> None:
    """Add a problem to the draft for each rule that is broken. Settings that failed already are not blamed again."""
    for names, rule in RULES:
        if not draft.failed.intersection(names):
            for problem in rule(draft):
                draft.problems.append(problem)


def _model(draft: Draft) -> Iterator[str]:
    if draft.values["model_name"] is None and draft.values["model_config"] is None:
        yield (
            "model_name is not set: name a folder or a hub id with --model_name, or a config JSON with --model_config to "
            "start from random weights"
        )
    if draft.values["model_name"] is not None and draft.values["model_config"] is not None:
        yield f"{draft.describe('model_name')}, but {draft.describe('model_config')}. Leave one of them out."


def _tokenizer(draft: Draft) -> Iterator[str]:
    if draft.values["model_config"] is not None and draft.values["tokenizer_name"] is None:
        yield "tokenizer_name is not set: a model_config brings no tokenizer, so name one with --tokenizer_name"


def _attention(draft: Draft) -> Iterator[str]:
    if draft.values["use_fast_kernels"] and draft.is_given("attn_implementation"):
        yield (
            f"{draft.describe('use_fast_kernels')} picks the attention kernel, but {draft.describe('attn_implementation')}. "
            "Leave one of them out."
        )


def _run_folder(draft: Draft) -> Iterator[str]:
    if draft.values["save_checkpoint_path"] is None:
        yield "save_checkpoint_path is not set: name the run folder with --save_checkpoint_path"


def _learning_rate(draft: Draft) -> Iterator[str]:
    if draft.values["lr_min"] > draft.values["lr"]:
        yield f"{draft.describe('lr_min')}, above lr: {draft.describe('lr')}. The learning rate falls from lr to lr_min."


def _warmup_start(draft: Draft) -> Iterator[str]:
    if draft.values["lr_warmup_start"] > draft.values["lr"]:
        yield f"{draft.describe('lr_warmup_start')}, above lr: {draft.describe('lr')}. The warm-up rises to lr."


def _whole_steps(draft: Draft) -> Iterator[str]:
    for name in ("lr_warmup", "lr_decay"):
        value = draft.values[name]
        if value is not None and value > 1 and value != int(value):
            yield f"{draft.describe(name)}: above 1 it counts steps, so it must be whole; up to 1 it is a fraction of the run."


def _phases(draft: Draft) -> Iterator[str]:
    """The phases that conflict whatever the length of the run; a plan checks the others."""
    warmup, decay, style = (draft.values[name] for name in ("lr_warmup", "lr_decay", "lr_decay_style"))
    decay = decay or (0.1 if style == "wsd" else 1.0)
    if warmup == 1:
        yield (
            f"{draft.describe('lr_warmup')}: 1 is a fraction, the whole run, so the learning rate would never reach lr. Set a "
            "fraction such as 0.05, or 2 steps or more."
        )
        return
    if (warmup > 1) != (decay > 1):
        return
    if style in ("cosine", "linear") and warmup >= decay:
        yield (
            f"{draft.describe('lr_warmup')}, but the decay ends at {decay} (lr_decay). Both are counted from the start of the "
            "run: set lr_decay above lr_warmup."
        )
    if style == "wsd" and decay <= 1 < warmup + decay:
        yield f"lr_warmup {warmup} and lr_decay {decay} are fractions of the run and sum to more than 1. Set one to less."


def _optimizer(draft: Draft) -> Iterator[str]:
    kind = draft.values["optimizer_type"]
    strangers = ("sgd_momentum",) if kind == "adamw" else ("adam_beta1", "adam_beta2", "adam_eps")
    for name in strangers:
        if draft.is_given(name):
            yield f"{draft.describe(name)} has no effect: {draft.describe('optimizer_type')}. Leave one of them out."


def _checkpoints(draft: Draft) -> Iterator[str]:
    if draft.values["save_optimizer"] and not draft.values["save_model"]:
        yield (
            f"{draft.describe('save_model')}, but {draft.describe('save_optimizer')}: the optimizer's state is of no use "
            "without the weights. Set save_optimizer to false too."
        )


def _two_starts(draft: Draft) -> Iterator[str]:
    resume, other, own = (draft.values[name] for name in ("resume", "load_checkpoint_path", "save_checkpoint_path"))
    if resume not in RESUME_WORDS and other is not None and other != own:
        yield (
            f"{draft.describe('resume')} names where to begin, but {draft.describe('load_checkpoint_path')}. Leave one of them out."
        )


def _retention(draft: Draft) -> Iterator[str]:
    for name in ("keep_every", "keep_best"):
        if draft.values[name] is not None and draft.values["keep_last"] is None:
            yield f"{draft.describe(name)} has no effect: keep_last is not set, so all are kept. Set --keep_last too."
    if draft.values["keep_best"] is not None and not (
        draft.values["validation_data"] or draft.values["validation_split"] is not None
    ):
        yield f"{draft.describe('keep_best')} needs a validation loss: name data with --validation_data, or leave it out."


def _checkpoint_format(draft: Draft) -> Iterator[str]:
    if draft.values["checkpoint_format"] != "deepspeed":
        return
    if draft.values["engine"] != "deepspeed":
        yield (
            f"{draft.describe('checkpoint_format')}, but {draft.describe('engine')}: only DeepSpeed writes its own files. Leave "
            "one of them out."
        )
    if not draft.values["save_optimizer"]:
        yield (
            f"{draft.describe('save_optimizer')}, but {draft.describe('checkpoint_format')}: DeepSpeed keeps the float32 weights "
            "with the optimizer's state, and other programs cannot read the ones without the other. Leave one of them out."
        )


def _wandb(draft: Draft) -> Iterator[str]:
    if draft.values["wandb_project"] is not None or draft.values["wandb_mode"] != "auto":
        return
    for name in ("wandb_entity", "wandb_name"):
        if draft.is_given(name):
            yield f"{draft.describe(name)} has no effect: wandb_project is not set. Name it with --wandb_project."


RULES: tuple[tuple[tuple[str, ...], Callable[[Draft], Iterator[str]]], ...] = (
    (("model_name", "model_config"), _model),
    (("model_name", "model_config", "tokenizer_name"), _tokenizer),
    (("attn_implementation", "use_fast_kernels"), _attention),
    *DATA_RULES,
    (("save_checkpoint_path",), _run_folder),
    (("lr", "lr_min"), _learning_rate),
    (("lr", "lr_warmup_start"), _warmup_start),
    (("lr_warmup", "lr_decay"), _whole_steps),
    (("lr_warmup", "lr_decay", "lr_decay_style"), _phases),
    (("optimizer_type", "sgd_momentum", "adam_beta1", "adam_beta2", "adam_eps"), _optimizer),
    (("save_model", "save_optimizer"), _checkpoints),
    (("keep_last", "keep_every", "keep_best", "validation_data", "validation_split"), _retention),
    (("checkpoint_format", "engine", "save_optimizer"), _checkpoint_format),
    *GUARD_RULES,
    *HANG_RULES,
    (("resume", "load_checkpoint_path", "save_checkpoint_path"), _two_starts),
    (("wandb_project", "wandb_entity", "wandb_name", "wandb_mode"), _wandb),
)
