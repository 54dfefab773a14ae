"""How a check names a setting, and what it says of a path that is not there."""

from pathlib import Path

from ds_recipes.config.entries import nearest
from ds_recipes.config.schema import Config
from ds_recipes.config.values import COMMAND_LINE


def where_given(config: Config, name: str, text: str) -> str:
    """'--name text (command line)' or 'run.yaml:3: name text'."""
    origin = config.origins.get(name, "default")
    return f"--{name} {text} (command line)" if origin == COMMAND_LINE else f"{origin}: {name} {text}"


def similar(path: Path) -> str:
    """What to do: take the nearest name in the same folder, or look where the path leads."""
    parent = path.parent
    if not parent.is_dir():
        missing = next(folder for folder in reversed((parent, *parent.parents)) if not folder.exists())
        return f" ({missing} does not exist); check the path{_looked_in(path)}"
    try:
        guess = nearest(path.name, [other.name for other in parent.iterdir()])
    except OSError:
        guess = None
    return f"; did you mean {parent / guess}?" if guess else f"; check the path{_looked_in(path)}"


def _looked_in(path: Path) -> str:
    return "" if path.is_absolute() else f" (looked in {Path.cwd()})"
