"""Upload an exported model to the Hugging Face hub. The repository is private unless you say --public.

    python tools/upload_to_hub.py --path RUN/hf --repo NAME [--branch BRANCH] [--tag TAG] [--dry_run]
    python tools/upload_to_hub.py --path RUN/exports --repo NAME --each branch [--start 600 --end 800 --increment 200]

First comes a table of what would be sent and where; --dry_run ends there, without network or token. Then only what the hub
does not have yet is sent, all files of a model appear there in one commit, and sizes and hashes of what lies there are
compared with the folder. An interrupted upload is continued by the same command. Options may be written with - or _.

The token is that of HF_TOKEN, of `hf auth login`, or of the file named by --token_file. There is no option for the token
itself, because every user of the machine sees the command lines of all processes.

Exit status: 0 it is there and checked, 1 it failed (run it again), 2 the input is wrong.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence

from ds_recipes.checkpoint.hub.credentials import hide_secrets_in_output
from ds_recipes.checkpoint.hub.folder import ModelFolder, exports_in, read_folder
from ds_recipes.config.values import path_argument
from ds_recipes.errors import ConfigError, DsRecipesError

BRANCH_NAME = re.compile(r"(?!refs/|[-/.])(?!.*(\.\.|//|@\{|\.lock$|[/.]$))[\w./+@-]{1,200}")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Raises: ConfigError if options contradict each other; SystemExit(2) if one is unknown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--path",
        "--ckpt_path",
        type=path_argument,
        required=True,
        help="folder of a Hugging Face model, or with --each of several",
    )
    add("--repo", "--repo_name", required=True, help="user/name or organisation/name; a name alone is yours")
    add("--branch", "--branch_name", help="branch; created if it is not there (default: main)")
    add("--tag", help="give the commit this tag")
    add(
        "--each",
        choices=("branch", "tag"),
        help="upload each export (iter_0000600, ...) in --path, to a branch or tag of its name",
    )
    add("--start", type=int, help="with --each: first step")
    add("--end", type=int, help="with --each: last step")
    add("--increment", type=int, help="with --each: every so many steps, none missing")
    add("--public", action="store_true", help="create the repository readable for everybody (default: private)")
    add("--message", help="of the commit (default: names the folder)")
    add("--include", nargs="+", default=[], metavar="PATTERN", help="take only files that match one of these")
    add("--exclude", nargs="+", default=[], metavar="PATTERN", help="take no files that match one of these")
    add("--replace", action="store_true", help="delete files of the branch that the folder does not have")
    add("--token_file", type=path_argument, help="file that holds the token (default: HF_TOKEN, or `hf auth login`)")
    add("--dry_run", action="store_true", help="only show what would be sent; needs no network and no token")
    given = parser.parse_args(
        [re.sub(r"^--[\w-]+", lambda found: f"--{found[0][2:].replace('-', '_')}", word) for word in words]
    )
    _check(given)
    return given


def _check(given: argparse.Namespace) -> None:
    problems = []
    if given.each and (given.tag or (given.branch and given.each == "branch")):
        problems.append(
            f"--each {given.each}: names the {given.each} itself; leave --{'tag' if given.tag else 'branch'} out"
        )
    steps = (given.start, given.end, given.increment)
    if not given.each and any(step is not None for step in steps):
        problems.append("--start, --end and --increment choose among several exports: they need --each")
    if given.increment is not None and given.increment < 1:
        problems.append(f"--increment {given.increment}: not a positive number")
    for flag in ("branch", "tag"):
        name = getattr(given, flag)
        if name is not None and not BRANCH_NAME.fullmatch(name):
            problems.append(f"--{flag} {name!r}: not a name that git takes")
    if problems:
        raise ConfigError(problems)


def main(words: Sequence[str]) -> int:
    """Returns the exit status."""
    hide_secrets_in_output()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        given = parse(words)
        paths = exports_in(given.path, given.start, given.end, given.increment) if given.each else [given.path]
        folders = [read_folder(path, given.include, given.exclude) for path in paths]
        for folder in folders:
            show(folder, given)
        if given.dry_run:
            new = "PUBLIC" if given.public else "private"
            print(
                f"{given.repo}: {new} if it is created; one that exists keeps its visibility\ndry run: nothing was sent"
            )
            return 0
        upload(folders, given)
    except DsRecipesError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def leave(*_: object) -> None:
    """At once: otherwise files on their way would be waited for. Nothing here has to be cleared up."""
    os.write(2, b"stopped. Run the same command again: what has arrived is not sent a second time.\n")
    os._exit(1)


def branch_and_tag(folder: ModelFolder, given: argparse.Namespace) -> tuple[str, str | None]:
    """Where a folder goes."""
    own = folder.path.resolve().name
    return own if given.each == "branch" else given.branch or "main", own if given.each == "tag" else given.tag


def show(folder: ModelFolder, given: argparse.Namespace) -> None:
    """What goes where, and what stays."""
    branch, tag = branch_and_tag(folder, given)
    print(f"{folder.path} -> {given.repo}, branch {branch}{f', tag {tag}' if tag else ''}")
    width = max(len(file.name) for file in folder.files)
    for file in folder.files:
        print(f"  {file.name:<{width}}  {size_text(file.size):>9}")
    print(f"  {f'{len(folder.files)} files':<{width}}  {size_text(folder.size):>9}")
    for name, reason in folder.left_out:
        print(f"  not sent: {name} ({reason})")


def size_text(size: float) -> str:
    """Bytes, in the largest unit that leaves a digit before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def upload(folders: Sequence[ModelFolder], given: argparse.Namespace) -> None:
    """Raises: InputError, HubError."""
    from ds_recipes.checkpoint.hub.connect import connect
    from ds_recipes.checkpoint.hub.explain import explained
    from ds_recipes.checkpoint.hub.upload import Repository, Target

    with explained(given.repo):
        repository = Repository(connect(given.token_file, sys.stderr.isatty()), given.repo, say)
        repository.open(given.public)
        for folder in folders:
            say(f"{folder.path}: {size_text(folder.size)}")
            branch, tag = branch_and_tag(folder, given)
            message = given.message or f"Upload {folder.path.resolve().name}"
            repository.upload(folder, Target(branch, tag, message), given.replace)


def say(line: str) -> None:
    """At once, also into the file of a job's output."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
