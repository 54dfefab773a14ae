"""What the local servers that speak the hub's protocol have in common; each says itself what it has."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

COMMIT = "5" * 40


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers GET and HEAD alike through `answer`, and notes in `asked` what was asked for."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self._note_and_answer(with_body=False)

    def do_GET(self) -> None:
        self._note_and_answer(with_body=True)

    def answer(self, path: str, with_body: bool) -> None:
        """Send what lies at a path."""
        self.send_nothing(with_body, "EntryNotFound")

    def send(self, body: bytes, with_body: bool, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def send_file(self, content: bytes, with_body: bool) -> None:
        """Send a file of the one commit, with size and ETag."""
        self.send(content, with_body, {"ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMIT})

    def send_nothing(self, with_body: bool, code: str) -> None:
        """Say in the hub's way that there is no such thing."""
        self.send(b"", with_body, {"X-Error-Code": code}, status=404)

    def log_message(self, *_: object) -> None:
        return

    def _note_and_answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        self.answer(path, with_body)


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def served(handler: type[HubHandler]) -> Iterator[str]:
    """The address of a server with this handler."""
    handler.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
