"""tools/upload_to_hub.py as a user starts it, against a local hub that keeps the files and can make trouble."""

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.hub_user import NAME, TOOL, User, contents
from tests.e2e.launchers import ROOT, run
from tests.hub_content import Entry
from tests.hub_store import hub_store
from tests.unit.checkpoint.test_hub import TOKEN, make_model

XET = {"with Xet": "0", "without Xet": "1"}

GUARD = """
import os, sys
def note(event, args):
    if event == "socket.connect":
        with open(os.environ["SOCKETS"], "a") as file:
            print(args[1], file=file)
    elif event == "socket.getaddrinfo":
        with open(os.environ["SOCKETS"], "a") as file:
            print(args[:2], file=file)
sys.addaudithook(note)
"""


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    with hub_store(tokens={TOKEN: "write"}) as (address, store):
        yield User(tmp_path, address, store)


@pytest.mark.parametrize("disabled", XET.values(), ids=XET)
def test_a_model_goes_to_a_branch_of_a_private_repository_once(user: User, tmp_path: Path, disabled: str) -> None:
    model = make_model(tmp_path / "hf", shards=2, words=60_000)
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    before = contents(model)
    user.store.part_bytes = 100_000  # the storage takes three parts of each file
    guard = tmp_path / "guard" / "sitecustomize.py"
    guard.parent.mkdir()
    guard.write_text(GUARD)
    env = {"SOCKETS": str(tmp_path / "sockets"), "PYTHONPATH": f"{guard.parent}:{ROOT}", "HF_HUB_DISABLE_XET": disabled}
    flags = ["--branch", "runs/first", "--tag", "v1"]

    output = user.succeeds(model, *flags, **env)
    repo = user.store.repos[NAME]
    assert repo.private and "private" in output
    assert user.store.files(NAME, "runs/first") == user.store.files(NAME, "v1") == before == contents(model)
    assert list(repo.commits[repo.branches["main"]].tree) == [".gitattributes"]
    assert [commit.title for commit in repo.commits.values()] == ["initial commit", "Upload hf"]
    assert (len(user.store.stored) == 6) == (disabled == "1") and not user.store.tokens_at_storage
    assert (
        output.index("model-00001-of-00002.safetensors")
        < output.index("created")
        < output.index("equals what was sent")
    )

    asked = len(user.store.asked)
    assert "nothing was sent" in user.succeeds(model, *flags, **env)
    assert "nothing was sent" in user.succeeds(model, "--branch", "runs/first", **env)
    changing = [line for line in user.store.asked[asked:] if not line.startswith(("GET", "HEAD"))]
    assert not changing
    port = user.env["HF_ENDPOINT"].rpartition(":")[2]
    sockets = (tmp_path / "sockets").read_text().splitlines()
    assert sockets and all("127.0.0.1" in line and port in line for line in sockets), sockets
    assert not [
        path for path in (tmp_path / "home").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]


def test_a_private_model_loads_from_its_branch_with_the_token_only(user: User) -> None:
    model = ROOT / "embedded" / "model"
    user.succeeds(model, "--branch", "b")
    code = (
        "import sys; from pathlib import Path; from huggingface_hub import snapshot_download\n"
        "path = Path(snapshot_download(sys.argv[1], revision='b'))\n"
        "from transformers import AutoConfig, AutoTokenizer\n"
        "print(AutoConfig.from_pretrained(sys.argv[1], revision='b').vocab_size)\n"
        "print(AutoTokenizer.from_pretrained(sys.argv[1], revision='b')('def main')['input_ids'])\n"
        "print(*sorted(file.name for file in path.iterdir()), (path / 'model.safetensors').stat().st_size)\n"
    )
    read = run([sys.executable, "-c", code, NAME], env=user.env)
    size = (model / "model.safetensors").stat().st_size
    names = sorted({path.name for path in model.iterdir()} | {".gitattributes"})
    assert read.status == 0, read.output
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    assert str(vocabulary) in read.output and f"{' '.join(names)} {size}" in read.output, read.output
    without = user.env | {"HF_TOKEN": "", "HF_HOME": user.env["HF_HOME"] + "2"}
    code = "import sys; from huggingface_hub import snapshot_download; snapshot_download(sys.argv[1], revision='b')"
    assert run([sys.executable, "-c", code, NAME], env=without).status != 0


def test_a_dry_run_shows_everything_and_needs_neither_network_nor_token(user: User, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf")
    (model / "optimizer.pt").write_text("?")
    output = user.succeeds(model, "--branch", "b", "--dry_run", HF_TOKEN="", HF_HUB_OFFLINE="1")
    for part in (f"-> {NAME}, branch b", "model.safetensors", "3 files", "optimizer.pt (state of training)", "private"):
        assert part in output
    assert not user.store.asked


def cut_off(content: bytes) -> bytes:
    return content[:-1]


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [cut_off, flipped])
def test_a_file_that_lies_there_differently_is_found(
    user: User, tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    model = make_model(tmp_path / "hf")

    def is_it(key: str) -> bool:
        return key == name or ("/" not in key and "." not in key and name == "model.safetensors")

    user.store.spoil = lambda key, content: damage(content) if is_it(key) else content
    ended = user.uploads(model, "--tag", "v1")
    assert ended.status == 1 and f"not what was sent: {name}" in ended.output, ended.output
    assert "v1" not in user.store.repos[NAME].tags


Answer = tuple[str, int, int, str]
ANSWERS: list[Answer] = [
    ("GET /api/whoami-v2", 401, 2, "does not accept the token"),
    ("POST /api/repos/create", 402, 2, "plan"),
    ("POST /api/repos/create", 403, 2, "write permission"),
    ("GET /api/models/someone/nano/refs", 404, 2, "--repo and --branch"),
    ("POST /api/models/someone/nano/branch", 409, 1, "Somebody else"),
    ("POST /api/models/someone/nano/commit/", 412, 1, "has moved"),
    ("GET /api/whoami-v2", 429, 1, "Too many requests"),
    ("POST /api/models/someone/nano/commit/", 500, 1, "fault of its own"),
]


@pytest.mark.parametrize(("start", "status", "exit_status", "says"), ANSWERS, ids=lambda value: str(value)[-12:])
def test_each_refusal_says_what_to_do(
    user: User, tmp_path: Path, start: str, status: int, exit_status: int, says: str
) -> None:
    """The hub even repeats the token."""
    user.store.answers[start] = (status, {"Content-Type": "application/json"}, f'{{"error": "no: Bearer {TOKEN}"}}')
    ended = user.uploads(make_model(tmp_path / "hf"), "--branch", "b")
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert ended.status == exit_status and says in line and str(status) in line, ended.output


def test_tokens_that_may_not_write_and_commits_of_others(user: User, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf")
    user.store.tokens[TOKEN] = "read"
    ended = user.uploads(model)
    assert ended.status == 2 and "may only read" in ended.output and not user.store.repos
    user.store.tokens[TOKEN] = "write"
    repo = user.store.create(NAME, private=True)

    def somebody_commits(asked: str) -> None:
        if "/preupload/" in asked:
            repo.add("main", {"config.json": Entry(b"{}")}, repo.branches["main"], "theirs")

    user.store.on_ask = somebody_commits
    ended = user.uploads(model)
    assert ended.status == 1 and "412" in ended.output
    assert user.store.files(NAME, "main") == {"config.json": b"{}"}


def test_where_the_token_comes_from(user: User, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf")
    ended = user.uploads(model, HF_TOKEN="")
    assert ended.status == 2 and "no token" in ended.output and "hf auth login" in ended.output
    (tmp_path / "mine").write_text(f"{TOKEN}\n")
    user.succeeds(model, "--token_file", str(tmp_path / "mine"), HF_TOKEN="")
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(TOKEN)  # what `hf auth login` writes
    user.succeeds(model, HF_TOKEN="")
    assert user.uploads(model, "--token", TOKEN).status == 2, "it would show in the list of processes"


def test_without_a_way_to_the_hub_it_ends_within_seconds(user: User, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        ended = user.uploads(model, HF_ENDPOINT=f"http://127.0.0.1:{port}")
        assert time.monotonic() - started < 6
    assert ended.status == 1 and "did not answer" in ended.output
    ended = user.uploads(model, HF_HUB_OFFLINE="1")
    assert ended.status == 2 and "HF_HUB_OFFLINE" in ended.output


def test_visibility_is_chosen_once_and_never_changed(user: User, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf")
    assert "PUBLIC" in user.succeeds(model, "--public")
    assert not user.store.repos[NAME].private
    assert "PUBLIC: everybody can read it" in user.succeeds(model)
    assert not user.store.repos[NAME].private
    repo = user.store.create(NAME, private=True)
    ended = user.uploads(model, "--public")
    assert ended.status == 2 and "is private" in ended.output
    assert repo.private and not user.store.files(NAME, "main")


def test_each_export_goes_to_its_branch_or_tag(user: User, tmp_path: Path) -> None:
    exports = tmp_path / "exports"
    names = [f"iter_{step:07d}" for step in (600, 800, 1000)]
    for number, name in enumerate(names):
        make_model(exports / name, words=50 + number)
    make_model(exports / ".iter_0001200.partial-ab")
    user.succeeds(exports, "--each", "branch", "--start", "600", "--end", "1000", "--increment", "400")
    repo = user.store.repos[NAME]
    assert set(repo.branches) == {"main", names[0], names[2]}
    user.succeeds(exports, "--each", "tag")
    assert list(repo.tags) == names
    for name in names:
        assert user.store.files(NAME, name) == contents(exports / name)
    assert user.store.files(NAME, "main") == contents(exports / names[-1])
    make_model(exports / "iter_0001200", words=99)
    commits = len(repo.commits)
    assert user.succeeds(exports, "--each", "tag").count("nothing was sent") == 3
    assert len(repo.commits) == commits + 1
    (exports / names[0] / "config.json").write_text('{"model_type": "other"}')
    ended = user.uploads(exports, "--each", "tag")
    assert ended.status == 2 and "Tags are never moved" in ended.output


def test_two_exports_are_not_mixed_in_one_branch(user: User, tmp_path: Path) -> None:
    one, several = make_model(tmp_path / "one"), make_model(tmp_path / "several", shards=2)
    user.succeeds(one)
    ended = user.uploads(several)
    assert ended.status == 2 and "weights of another export (model.safetensors)" in ended.output
    assert user.store.files(NAME, "main") == contents(one)
    user.succeeds(several, "--branch", "new")
    assert user.store.files(NAME, "new") == contents(several), "a new branch begins empty"
    user.succeeds(several, "--replace")
    assert user.store.files(NAME, "main") == contents(several)
    assert ".gitattributes" in user.store.repos[NAME].commits[user.store.repos[NAME].branches["main"]].tree


@pytest.mark.parametrize("dash", ["-", "_"])
def test_the_ancestors_command_line(user: User, tmp_path: Path, dash: str) -> None:
    flags = {"--ckpt-path": str(make_model(tmp_path / "hf")), "--repo-name": "nano", "--branch-name": "iter_0000600"}
    words = [word for flag, value in flags.items() for word in (flag[:2] + flag[2:].replace("-", dash), value)]
    ended = run([sys.executable, str(TOOL), *words], env=user.env)
    assert ended.status == 0, ended.output
    assert user.store.files(NAME, "iter_0000600") == contents(tmp_path / "hf")


def test_a_name_that_the_hub_cannot_have_and_an_answer_that_is_none(user: User, tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf")
    ended = user.uploads(model, "--repo", "a/b/c")
    assert ended.status == 2 and "--repo a/b/c" in ended.output
    user.store.answers["GET /api/whoami-v2"] = (200, {"Content-Type": "text/html"}, "<html>Please log in")
    ended = user.uploads(model)
    assert ended.status == 1 and "proxy" in ended.output
    assert not user.store.repos
