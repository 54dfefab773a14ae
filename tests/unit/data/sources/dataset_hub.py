"""A local server that speaks as much of the hub's protocol as `datasets` asks for: one data set, whatever its files."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from tests.hub_server import COMMIT, HubHandler, etag, served

DATASET = "someone/data"


class DatasetHub(HubHandler):
    """Serves `files` as the data set DATASET at COMMIT."""

    files: dict[str, bytes]

    def answer(self, path: str, with_body: bool) -> None:
        name = path.rpartition("/")[2]
        if path == "/":
            self.send(b"", with_body)
        elif DATASET not in path:
            self.send_nothing(with_body, "RepoNotFound")
        elif path.startswith(f"/api/datasets/{DATASET}/tree/"):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": etag(d)} for n, d in self.files.items()]
            self.send(json.dumps(tree).encode(), with_body)
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            self.send(json.dumps({"id": DATASET, "sha": COMMIT, "siblings": siblings}).encode(), with_body)
        elif name in self.files:
            self.send_file(self.files[name], with_body)
        else:
            self.send_nothing(with_body, "EntryNotFound")


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[str]:
    """The address of a hub with these files."""
    DatasetHub.files = files
    with served(DatasetHub) as address:
        yield address
