"""A hub that keeps what is uploaded: repositories, branches, tags, commits and large files, over the hub's own protocol.

Written from what huggingface_hub 2.4 sends and expects. A test can make it drop connections, change stored bytes, refuse
tokens, or answer with any status.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_content import USER, Entry, Repo, Store, git_sha1
from tests.hub_server import HubHandler, served

PAGE = 3
"""Entries a page of the tree: small, so that every test turns pages."""


class StoreHandler(HubHandler):
    """Answers the calls that creating, uploading, listing and downloading make."""

    store: Store

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def _route(self) -> None:
        split = urlsplit(self.path)
        asked = f"{self.command} {unquote(split.path)}"
        self.store.asked.append(asked)
        self.store.on_ask(asked)
        if self.command == "PUT":
            self._keep(split.path)
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.query = parse_qs(split.query)
        forced = next((answer for start, answer in self.store.answers.items() if asked.startswith(start)), None)
        if forced is not None:
            status, headers, text = forced
            self.send(text.encode(), True, headers, status)
            return
        if split.path == "/":
            self.send(b"", False)
            return
        with self.store.lock:
            self._answer_api([unquote(part) for part in split.path.strip("/").split("/")])

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _answer_api(self, parts: list[str]) -> None:
        token = self._token()
        if parts[0] != "xet" and token is not None and token not in self.store.tokens:
            message = "Invalid credentials in Authorization header"
            self.json({"error": message}, 401, {"X-Error-Message": message})
        elif parts[0] == "lfs":
            self._answer_storage(parts)
        elif parts[0] == "xet":
            self._answer_xet(parts)
        elif parts == ["api", "whoami-v2"]:
            role = {"accessToken": {"role": self.store.tokens[token or ""]}}
            self.json({"name": USER, "orgs": [], "auth": role})
        elif parts == ["api", "validate-yaml"]:
            self.json({"errors": [], "warnings": []})
        elif parts == ["api", "repos", "create"]:
            self._create()
        elif parts[:2] == ["api", "models"]:
            self._answer_repo("/".join(parts[2:4]), parts[4:])
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self._batch()
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.send_nothing(True, "EntryNotFound")

    def json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(content).encode(), True, {"Content-Type": "application/json", **(headers or {})}, status)

    def _create(self) -> None:
        asked = json.loads(self.body)
        owner = asked["organization"] or USER
        name = f"{owner}/{asked['name']}"
        if owner != USER:
            self.json({"error": f"You don't have the rights to create a model under the namespace {owner}"}, 403)
        elif name in self.store.repos:
            self.json({"error": "You already created this model repo", "url": name}, 409)
        else:
            self.store.create(name, private=asked.get("visibility") == "private")
            self.json({"url": f"https://huggingface.co/{name}", "name": name})

    def _answer_repo(self, name: str, rest: list[str]) -> None:
        repo = self.store.repos.get(name)
        if repo is None or (repo.private and self._token() is None):
            self.json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        what = rest[0] if rest else "revision"
        revision = rest[1] if len(rest) > 1 else "main"
        oid = repo.find(revision)
        if what == "refs":
            heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
            tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()]
            self.json({"branches": heads, "tags": tags, "converts": []})
        elif what == "branch":
            self._ref(repo, repo.branches, revision, json.loads(self.body).get("startingPoint", "main"))
        elif oid is None:
            self.json({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif what == "tag":
            self._ref(repo, repo.tags, json.loads(self.body)["tag"], revision)
        elif what == "commits":
            self._commits(repo, oid)
        elif what == "tree":
            self._tree(repo.commits[oid].tree)
        elif what == "xet-write-token":
            self.json(
                {"accessToken": "of the storage", "exp": 4_000_000_000, "casUrl": f"http://{self.headers['Host']}/xet"}
            )
        elif what == "preupload":
            self._preupload(repo.commits[oid].tree)
        elif what == "commit":
            self._commit(name, repo, revision)
        else:
            siblings = [{"rfilename": path} for path in repo.commits[oid].tree]
            self.json({"id": name, "private": repo.private, "sha": oid, "siblings": siblings})

    def _ref(self, repo: Repo, refs: dict[str, str], name: str, start: str) -> None:
        if name in refs:
            self.json({"error": f"Reference {name} already exists"}, 409)
            return
        refs[name] = repo.find(start) or ""
        self.json({})

    def _commits(self, repo: Repo, oid: str | None) -> None:
        found = []
        while oid is not None:
            commit = repo.commits[oid]
            found.append({"id": oid, "authors": [{"user": USER}], "title": commit.title, "message": ""})
            found[-1]["date"] = "2026-01-01T00:00:00.000Z"
            oid = commit.parent
        self.json(found)

    def _tree(self, tree: dict[str, Entry]) -> None:
        start = int(self.query.get("cursor", ["0"])[0])
        names = sorted(tree)
        entries = [self._listed(name, tree[name]) for name in names[start : start + PAGE]]
        more = {}
        if start + PAGE < len(names):
            address = f"http://{self.headers['Host']}{urlsplit(self.path).path}?recursive=true&cursor={start + PAGE}"
            more = {"Link": f'<{address}>; rel="next"'}
        self.json(entries, headers=more)

    def _listed(self, name: str, entry: Entry) -> dict[str, Any]:
        """Sizes and hashes are those of the stored bytes, whatever was promised."""
        content = self.store.content(entry)
        listed = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
        if entry.oid is not None:
            listed["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return listed

    def _preupload(self, tree: dict[str, Entry]) -> None:
        def mode(file: dict[str, Any]) -> str:
            return "lfs" if file["path"].endswith(".safetensors") or file["size"] > 10_000_000 else "regular"

        def known(path: str) -> str | None:
            return None if path not in tree else tree[path].oid or git_sha1(tree[path].content)

        files = json.loads(self.body)["files"]
        self.json(
            {
                "files": [
                    {"path": file["path"], "uploadMode": mode(file), "shouldIgnore": False, "oid": known(file["path"])}
                    for file in files
                ]
            }
        )

    def _batch(self) -> None:
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.store.objects:
                here = f"http://{self.headers['Host']}/lfs/{oid}"
                signed = "?X-Amz-Signature=0123456789abcdef"
                upload: dict[str, Any] = {"href": here + signed}
                if size > self.store.part_bytes:
                    parts = range(1, ceil(size / self.store.part_bytes) + 1)
                    header = {str(part): f"{here}/{part}{signed}" for part in parts}
                    upload = {
                        "href": f"{here}/complete",
                        "header": {"chunk_size": str(self.store.part_bytes), **header},
                    }
                answer["actions"] = {"upload": upload, "verify": {"href": f"{here}/verify"}}
            answers.append(answer)
        self.json({"transfer": "basic", "objects": answers})

    def _keep(self, path: str) -> None:
        """The storage: takes a body if all of it arrives."""
        with self.store.lock:
            self.store.puts += 1
            number = self.store.puts
        if self.headers.get("Authorization"):
            self.store.tokens_at_storage.append(path)
        length = int(self.headers["Content-Length"])
        head = self.rfile.read(length // 2)
        if self.store.on_put(number):
            self.close_connection = True
            self.connection.close()
            return
        body = head + self.rfile.read(length - len(head))
        if len(body) < length:
            return
        key = path.strip("/").removeprefix("lfs/")
        with self.store.lock:
            self.store.stored.append(key)
            (self.store.parts if "/" in key else self.store.objects)[key] = self.store.spoil(key, body)
        self.send(b"", True, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def _answer_storage(self, parts: list[str]) -> None:
        oid, what = parts[1:3]
        if what == "complete":
            count = len(json.loads(self.body)["parts"])
            self.store.objects[oid] = b"".join(self.store.parts[f"{oid}/{part}"] for part in range(1, count + 1))
        self.json({}, 200 if oid in self.store.objects else 404)

    def _answer_xet(self, parts: list[str]) -> None:
        if self.command == "POST" and parts[2] == "xorbs":
            self.store.xet.add_xorb(parts[-1], self.body)
            self.json({"was_inserted": True})
        elif self.command == "POST" and parts[1:3] == ["v1", "shards"]:
            for content in self.store.xet.files_of(self.body):
                self.store.objects[hashlib.sha256(content).hexdigest()] = content
            self.json({"result": 1})
        else:
            self.json({}, 404)

    def _commit(self, name: str, repo: Repo, branch: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = repo.branches[branch]
        if header.get("parentCommit", head) != head:
            self.json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        tree = dict(repo.commits[head].tree)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = Entry(self.store.spoil(value["path"], base64.b64decode(value["content"])))
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.store.objects, "a commit names a file that never arrived"
                tree[value["path"]] = Entry(oid=value["oid"])
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        oid = repo.add(branch, tree, head, header["summary"])
        self.json({"commitUrl": f"https://huggingface.co/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.store.repos.get(name)
        oid = None if repo is None else repo.find(revision)
        if repo is None or oid is None or (repo.private and self._token() is None):
            self.json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif path not in repo.commits[oid].tree:
            self.send(b"", True, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}, 404)
        else:
            content = self.store.content(repo.commits[oid].tree[path])
            tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": oid}
            self.send(content, self.command == "GET", tag)


@contextmanager
def hub_store(**settings: Any) -> Iterator[tuple[str, Store]]:
    """A running hub: its address and its content."""
    handler = type("Handler", (StoreHandler,), {"store": Store(**settings)})
    with served(handler) as address:
        yield address, handler.store  # type: ignore[attr-defined]
