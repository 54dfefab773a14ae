"""From a command line to a frozen Config: flags over the run file over defaults, with the DeepSpeed JSON beside them."""

import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ds_recipes.config import seed_flags
from ds_recipes.config.draft import DEFAULT, Draft, frozen_groups
from ds_recipes.config.ds.check import check_tree
from ds_recipes.config.ds.combine import check_run
from ds_recipes.config.ds.read import read_json
from ds_recipes.config.entries import Entry, read_flags, read_yaml
from ds_recipes.config.render import help_text, to_yaml
from ds_recipes.config.rules import check_rules
from ds_recipes.config.schema import GROUPS, Config, DsConfig
from ds_recipes.config.values import FALSE_WORDS, TRUE_WORDS, expand_path
from ds_recipes.errors import ConfigError


def load_config(
    argv: Sequence[str], env: Mapping[str, str] = os.environ, stand_ins: Mapping[str, str] = MappingProxyType({})
) -> Config:
    """Read the settings of a run from a command line (without the program's name).

    `--help` and `--print_config` print and end the program with status 0. `env` serves only to compare the launcher's
    --local_rank with LOCAL_RANK. `stand_ins` has values for settings that a run must have and the program at hand does not
    need; they count where the user sets none.

    Raises:
        ConfigError: with every problem of flags, run file, JSON and their combination, one line each.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        sys.exit(0)
    flags, problems = read_flags(argv)
    draft = Draft(problems=problems)
    flags, run_file = _take_out(flags, "config", draft)
    flags, print_config = _take_out(flags, "print_config", draft)
    flags, local_rank = _take_out(flags, "local_rank", draft)
    _check_local_rank(local_rank, env, draft)
    flags, problems = seed_flags.translate(flags)
    draft.problems += problems
    draft.take(flags)
    if run_file is not None:
        _take_run_file(run_file, draft)
    draft.take([Entry(name, (text,), name, DEFAULT) for name, text in stand_ins.items() if not draft.values[name]])
    config = _finish(draft)
    if print_config is not None and print_config not in FALSE_WORDS:
        print(to_yaml(config), end="")
        sys.exit(0)
    return config


def _take_run_file(path: str, draft: Draft) -> None:
    try:
        entries, problems = read_yaml(expand_path(path))
    except ValueError as error:
        draft.fail(str(error), *draft.values)
        return
    draft.problems += problems
    draft.take(entries)


def _take_out(flags: Sequence[Entry], name: str, draft: Draft) -> tuple[list[Entry], str | None]:
    """Separate a flag that is no setting from the others. Its text: None without the flag, "true" for a bare one."""
    mine = [flag for flag in flags if flag.name == name]
    others = [flag for flag in flags if flag not in mine]
    texts = {" ".join(flag.texts) or "true" for flag in mine}
    if name == "config" and any(len(flag.texts) != 1 for flag in mine):
        draft.fail("--config needs one path, of a run file (command line)", *draft.values)
        return others, None
    if name == "print_config" and not texts.issubset({*TRUE_WORDS, *FALSE_WORDS}):
        draft.fail(f"--print_config must be true or false, not {min(texts)!r} (command line)")
        return others, None
    if len(texts) > 1:
        draft.fail(
            f"--{name} is given twice, as {' and as '.join(sorted(texts))} (command line). Leave one of them out."
        )
    return others, min(texts, default=None)


def _check_local_rank(text: str | None, env: Mapping[str, str], draft: Draft) -> None:
    if text is None:
        return
    if not text.isdecimal():
        draft.fail(f"--local_rank must be a whole number, not {text!r} (command line)")
    elif env.get("LOCAL_RANK", text) != text:
        draft.fail(f"--local_rank is {text} (command line), but LOCAL_RANK is {env['LOCAL_RANK']} (environment)")


def _finish(draft: Draft) -> Config:
    """Read the JSON, check what must hold between settings, freeze."""
    ds = _read_ds_config(draft)
    check_rules(draft)
    if draft.problems:
        raise ConfigError(draft.problems)
    return Config(**frozen_groups(draft.values, GROUPS), ds=ds, origins=MappingProxyType(draft.origins))


def _read_ds_config(draft: Draft) -> DsConfig | None:
    path, engine = draft.values["ds_config"], draft.values["engine"]
    if path is None:
        return None
    try:
        tree, notes = read_json(path)
    except ValueError as error:
        draft.fail(str(error))
        return None
    found = check_tree(tree, engine)
    draft.adopt(path, found)
    if "precision" not in draft.failed:
        for problem in check_run(found.tree, draft.values["precision"]):
            draft.fail(f"{path}: {problem}")
    lines = [*(f"{path} {note}" for note in notes), *(f"{path}: {note}" for note in found.notes)]
    lacking = [
        f"{path}: FSDP2 has no counterpart of these keys, and no result depends on them: {', '.join(found.lacking)}"
    ]
    return DsConfig(path, MappingProxyType(found.tree), tuple(lines), tuple(lacking if found.lacking else ()))
