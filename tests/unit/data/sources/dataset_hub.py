"""A local server that speaks as much of the hub's protocol as `datasets` asks for: one data set, whatever its files."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

DATASET = "someone/data"
COMMIT = "5" * 40


class DatasetHub(http.server.BaseHTTPRequestHandler):
    """Serves `files` as the data set DATASET at COMMIT; `asked` is what was asked for."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        name = path.rpartition("/")[2]
        if path == "/":
            self.send(b"", with_body)
        elif DATASET not in path:
            self.send(b"", with_body, {"X-Error-Code": "RepoNotFound"}, status=404)
        elif path.startswith(f"/api/datasets/{DATASET}/tree/"):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": etag(d)} for n, d in self.files.items()]
            self.send(json.dumps(tree).encode(), with_body)
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            self.send(json.dumps({"id": DATASET, "sha": COMMIT, "siblings": siblings}).encode(), with_body)
        elif name in self.files:
            tag = f'"{etag(self.files[name])}"'
            self.send(self.files[name], with_body, {"ETag": tag, "X-Repo-Commit": COMMIT})
        else:
            self.send(b"", with_body, {"X-Error-Code": "EntryNotFound"}, status=404)

    def send(self, body: bytes, with_body: bool, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[str]:
    """The address of a hub with these files."""
    DatasetHub.files, DatasetHub.asked = files, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), DatasetHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
