"""Check DeepSpeed JSON files before a job is queued.

    python tools/lint_ds_config.py FILE... [--engine fsdp] [--world 64]
    python tools/lint_ds_config.py --explain KEY

Says what DeepSpeed refuses or ignores, what train.py would refuse, what has no effect, what a step will be on that many
ranks and the memory that it takes. Exit status 2 if a file has errors, 0 if not, even if train.py would refuse a setting.
"""

import argparse
import sys
from collections.abc import Sequence

from ds_recipes.config.lint.explain import explain
from ds_recipes.config.lint.report import ERROR, LEVELS, lint_file
from ds_recipes.config.lint.show import show

WRONG = 2


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.explain:
        words, is_known = explain(given.explain)
        print(words)
        return 0 if is_known else WRONG
    wrong = False
    for number, path in enumerate(given.files):
        report = lint_file(path, given.engine, given.world)
        show(report, LEVELS, is_first=number == 0)
        wrong = wrong or bool(report.of(ERROR))
    return WRONG if wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="a DeepSpeed JSON")
    parser.add_argument("--engine", choices=("deepspeed", "fsdp"), default="deepspeed", help="what will train")
    parser.add_argument("--world", type=int, metavar="RANKS", help="number of ranks, for batch sizes and memory")
    parser.add_argument("--explain", metavar="KEY", help="explain a key, dotted or bare, instead of checking files")
    given = parser.parse_args(arguments)
    if bool(given.files) == bool(given.explain):
        parser.error("give files, or --explain KEY")
    if given.world is not None and given.world < 1:
        parser.error("--world must be at least 1")
    return given


if __name__ == "__main__":
    sys.exit(main())
