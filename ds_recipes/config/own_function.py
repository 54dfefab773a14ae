"""A user's own format, named as `path/to/file.py:function`: what can be told of it without running it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from ds_recipes.config.parsing import PARSING

OWN = re.compile(r"(?P<file>.+\.py):(?P<function>\w+)", re.DOTALL)


def split_own(dataset: str) -> tuple[Path, str] | None:
    """The file and the function, or None if the value is no such name."""
    match = OWN.fullmatch(dataset)
    return (Path(match["file"]), match["function"]) if match else None


def check_own(dataset: str) -> str | None:
    """What is wrong with a value of `dataset` that is meant as a function, completing "NAME: "; None if nothing is.

    The file is parsed, never run.
    """
    named = split_own(dataset)
    if named is None:
        return "names no function; write path/to/file.py:function"
    path, function = named
    try:
        with PARSING:
            tree = ast.parse(path.read_bytes(), filename=str(path))
        names = set(_names(tree))
    except FileNotFoundError:
        return f"there is no file {path} (looked in {Path.cwd()})"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last: nesting beyond the parser
        return f"{path}{_line(error)} is not Python ({getattr(error, 'msg', None) or type(error).__name__})"
    if function in names or "*" in names:
        return None
    functions = ", ".join(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    return f"{path} has no function {function!r}; it has {functions or 'none at all'}"


def _line(error: Exception) -> str:
    return f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""


def _names(node: ast.AST) -> Iterator[str]:
    """The names that a module binds, in its ifs and trys too; `*` stands for names that cannot be told."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in child.names)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        else:
            yield from _names(child)
