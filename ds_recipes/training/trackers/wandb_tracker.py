"""Weights & Biases. The only file that imports wandb, and only when a run asks for it."""

import netrc
import secrets
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ds_recipes.config.schema import LoggingConfig
from ds_recipes.fsops.durable import make_folders, replace_file
from ds_recipes.training.trackers.base import Tracker, panel_values

INIT_SECONDS = 60.0
FINISH_SECONDS = 30.0
DEFAULT_URL = "https://api.wandb.ai"


class WandbTracker(Tracker):
    """One wandb run for one run folder, however often it is started again. wandb's files lie in RUN/wandb.

    Starting again from step k logs the steps after k a second time; wandb keeps what it has, which is the same, unless the
    run went back after a divergence: then wandb shows that until the run has passed it.
    """

    def __init__(self, logging: LoggingConfig, mode: str, run_folder: Path, settings: Mapping[str, Any]) -> None:
        """`settings` become the run's config there. Runs in the tracker's own thread.

        Raises:
            Exception: whatever wandb raises: no network, a wrong key, no disk space.
        """
        import wandb

        self._run = wandb.init(
            entity=logging.wandb_entity,
            project=logging.wandb_project or "ds_recipes",
            name=logging.wandb_name or run_folder.name,
            id=run_id(run_folder),
            resume="allow",
            mode="online" if mode == "online" else "offline",
            dir=run_folder,
            config=dict(settings),
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS
            ),
        )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send a step's numbers under the names of their panels."""
        self._run.log(panel_values(metrics), step=step)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send an evaluation's numbers, on the same axis."""
        self._run.log(panel_values(metrics), step=step)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Events stay in the run folder."""

    def rewind(self, step: int, total_steps: int) -> None:
        """wandb's steps only ever grow: it takes numbers again once the run is beyond those that it has."""

    def close(self) -> None:
        """Send what is left, for `FINISH_SECONDS` at most."""
        self._run.finish()


def wandb_mode(logging: LoggingConfig, environment: Mapping[str, str], home: Path) -> str | None:
    """How this run uses wandb: "online", "offline", or None for not at all.

    "auto" with a project means: what WANDB_MODE says, else online if there is a key (WANDB_API_KEY, or the entry that
    `wandb login` wrote into the netrc file), else offline.
    """
    if logging.wandb_mode == "disabled":
        return None
    if logging.wandb_mode != "auto":
        return logging.wandb_mode
    if logging.wandb_project is None:
        return None
    asked = environment.get("WANDB_MODE", "")
    if asked:
        return {"disabled": None, "online": "online"}.get(asked, "offline")
    return "online" if environment.get("WANDB_API_KEY") or _has_login(environment, home) else "offline"


def _has_login(environment: Mapping[str, str], home: Path) -> bool:
    host = urlsplit(environment.get("WANDB_BASE_URL", DEFAULT_URL)).netloc
    places = [Path(environment["NETRC"])] if environment.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for path in places:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def run_id(run_folder: Path) -> str:
    """The wandb run's id, made once and kept in RUN/wandb/run_id."""
    path = run_folder / "wandb" / "run_id"
    if path.exists() and (kept := path.read_text().strip()):
        return kept
    made = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    make_folders(path.parent)
    replace_file(path, f"{made}\n".encode())
    return made
