"""A user of tools/upload_to_hub.py, with a token and a hub to talk to."""

import sys
from pathlib import Path

from tests.e2e.launchers import ROOT, Ended, run
from tests.hub_content import Store
from tests.unit.checkpoint.test_hub import TOKEN

TOOL = ROOT / "tools" / "upload_to_hub.py"
NAME = "someone/nano"


class User:
    """Somebody at a terminal with a token, and the hub that they talk to."""

    def __init__(self, folder: Path, address: str, store: Store) -> None:
        self.store = store
        self.env = {
            "HF_ENDPOINT": address,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    def words(self, path: Path, *flags: str) -> list[str]:
        return [sys.executable, str(TOOL), "--path", str(path), "--repo", NAME, *flags]

    def uploads(self, path: Path, *flags: str, **env: str) -> Ended:
        """Run it to its end. Whatever happens, nobody sees the token, and no user a traceback."""
        ended = run(self.words(path, *flags), env=self.env | env, timeout=60)
        assert TOKEN not in ended.output and "Traceback" not in ended.output, ended.output
        return ended

    def succeeds(self, path: Path, *flags: str, **env: str) -> str:
        ended = self.uploads(path, *flags, **env)
        assert ended.status == 0, ended.output
        return ended.output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
