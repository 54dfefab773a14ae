"""What the house tests look at: the files of the project, and what Python's own parser says of them."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("ds_recipes", "tools", "tests", "benchmarks")


def python_files(*folders: str) -> list[Path]:
    """Python files below the folders, and train.py, as paths relative to the repository."""
    chosen = folders or CODE_FOLDERS
    found = [path.relative_to(ROOT) for folder in chosen for path in sorted((ROOT / folder).rglob("*.py"))]
    return found if folders else [*found, Path("train.py")]


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), filename=str(file))


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands: in functions and under TYPE_CHECKING too.

    `from package import name` gives both `package` and `package.name`, since the name may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports from the package's root"
            yield node.lineno, str(node.module)
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def module_name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
