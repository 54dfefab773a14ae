"""Data, models, tokenizers and checkpoints that cannot be used: status 2 on all ranks and one message, shown once."""

import http.server
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.bad_input import (
    Case,
    assert_refused,
    checkpoints_in,
    damage,
    guarded_stumble,
    run_on_ranks,
    run_train,
)
from tests.ranks.launch import rank_environment

ALPACA = json.dumps({"instruction": "Say yes.", "input": "", "output": "Yes."}) + "\n"
NO_ANSWER = json.dumps({"instruction": "Say yes.", "output": ""}) + "\n"
FINE = '{"text": "a fox"}\n'
LONGEST_SECONDS = 20.0
"""Without its one short question, a missing name costs 23 s of retries where the hub cannot be reached."""


def with_data(content: str, *says: str, flags: str = "", ranks: int = 1) -> Case:
    return Case(f"--train_data bad.jsonl {flags}", says, ranks, files={"bad.jsonl": content})


DATA = {
    "a line that is not JSON": with_data(
        FINE * 2 + '{"t\n' + FINE, "bad.jsonl:3: not JSON", "2 records before it are fine", "Fix or remove", ranks=2
    ),
    "a record that is no object": with_data(
        FINE + "[1]\n", "bad.jsonl:2: not a JSON object but an array", "fix or remove"
    ),
    "a record without the field": with_data(
        FINE + ALPACA, "bad.jsonl:2: the record has no field 'text'", "'instruction'", "set --dataset", ranks=2
    ),
    "an alpaca record without the field": with_data(
        ALPACA + FINE, "bad.jsonl:2: the record has no field 'instruction'", "set --dataset", flags="--dataset alpaca"
    ),
    "a field that is no text": with_data(FINE + '{"text": 7}\n', "bad.jsonl:2: 'text' is a number", "Fix or remove"),
    "a text without a token": with_data(
        FINE + '{"text": ""}\n', "bad.jsonl:2: 'text' is empty", "Fill it in or remove"
    ),
    "an answer without a token": with_data(
        ALPACA + NO_ANSWER, "bad.jsonl:2: 'output' is empty", "no target token", "Fill it in", flags="--dataset alpaca"
    ),
    "a prompt that fills the row": with_data(
        ALPACA, "bad.jsonl:1: the prompt has ", "no target fits", "Raise --context_size", flags="--dataset alpaca"
    ),
    "blank lines alone": with_data("\n\n", "bad.jsonl: holds no records", "Name a file with one JSON object a line"),
    "a mistake in the validation data": Case(
        "--validation_data bad.jsonl",
        ("bad.jsonl:1: not JSON", "Fix or remove the line."),
        files={"bad.jsonl": "no"},
    ),
}

MODELS = {
    "unknown hub model": Case(
        "--model_name nobody/nothing",
        ("--model_name nobody/nothing", "no such folder", "could not be reached", "pass a folder"),
        ranks=2,
    ),
    "a model of an unknown kind": Case(
        "--model_config odd.json --tokenizer_name ./model",
        ("odd.json: cannot be read as a model's config", "nonsense", "Check the file"),
        without=("--model_name",),
        files={"odd.json": '{"model_type": "nonsense"}'},
    ),
    "a model folder without weights": Case(
        "--model_name ./bare", ("bare: no model.safetensors", "Name a folder with weights")
    ),
    "unknown hub tokenizer": Case(
        "--tokenizer_name nobody/nothing", ("tokenizer nobody/nothing", "Check --tokenizer_name, or pass a folder.")
    ),
    "a tokenizer that cannot be read": Case(
        "--tokenizer_name ./garbled", ("tokenizer ./garbled: cannot be loaded", "Check its tokenizer files.")
    ),
    "a tokenizer without EOS": Case(
        "--tokenizer_name ./tokenizer_without_eos",
        ("tokenizer ./tokenizer_without_eos: has no EOS token", "with --eos_token, such as --eos_token"),
    ),
    "token ids beyond the embedding": Case(
        "--tokenizer_name ./tokenizer_too_large --train_data bad.jsonl",
        ("bad.jsonl:2: the tokenizer makes token", "ids below 300", "Set --tokenizer_name to the model's own"),
        ranks=2,
        files={"bad.jsonl": '{"text": "aardvark"}\n' + FINE},
    ),
}

CHECKPOINTS = {
    "checkpoints of another model": Case(
        "--model_name ./wider --save_checkpoint_path runs/done",
        (
            "runs/done/iter_0000002 holds another model",
            "model.embed_tokens.weight",
            "Name the model that it was made with",
        ),
        ranks=2,
    ),
    "checkpoints of another model to load": Case(
        "--model_name ./wider --load_checkpoint_path runs/done",
        ("runs/done/iter_0000002 holds another model", "--load_checkpoint_path"),
    ),
    "all checkpoints to load are damaged": Case(
        "--load_checkpoint_path runs/damaged",
        ("runs/damaged: none of its 2 checkpoints can be used", "never starts again from nothing", "Bring one back"),
        ranks=2,
    ),
    "all checkpoints of the run are damaged": Case(
        "--save_checkpoint_path runs/damaged",
        ("runs/damaged: none of its 2 checkpoints can be used", "never starts again from nothing", "Bring one back"),
    ),
    "no checkpoint to load": Case(
        "--load_checkpoint_path model", ("--load_checkpoint_path model: holds no checkpoint", "Name a run folder")
    ),
    "checkpoints with --resume none": Case(
        "--save_checkpoint_path runs/done --resume none",
        ("runs/done: holds checkpoints", "--resume none refuses", "Choose a new --save_checkpoint_path"),
    ),
    "no checkpoint with --resume require": Case(
        "--save_checkpoint_path runs/fresh --resume require",
        ("runs/fresh: holds no checkpoint", "--resume require refuses", "Check --save_checkpoint_path"),
    ),
    "another context size than the checkpoint's": Case(
        "--save_checkpoint_path runs/done --context_size 16",
        ("runs/done/iter_0000002 was made with other settings", "context_size: ", "--allow_change context_size"),
    ),
}


@pytest.fixture(scope="module")
def material(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs, and `bare`, a model folder without weights, and `garbled`, a tokenizer that cannot be read."""
    folder = tmp_path_factory.mktemp("input") / "material"
    shutil.copytree(inputs, folder)
    shutil.copytree(folder / "model", folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "garbled").mkdir()
    (folder / "garbled/tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(material: Path) -> Path:
    """The material with two runs: `runs/done` of two steps, and `runs/damaged`, whose checkpoints are all damaged."""
    flags = "--save_checkpoint_path runs/done --save_interval_iteration 1 --max_steps 2"
    ended = run_on_ranks(material, Case(flags, ()).arguments())
    assert ended.statuses == [0], ended.output
    shutil.copytree(material / "runs/done", material / "runs/damaged")
    damage(material / "runs/damaged")
    return material


@pytest.mark.parametrize("name", DATA | MODELS)
def test_inputs_that_cannot_be_used_are_refused(name: str, material: Path) -> None:
    case = (DATA | MODELS)[name]
    refuse(case, material)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_that_cannot_be_continued_are_refused(name: str, trained: Path) -> None:
    refuse(CHECKPOINTS[name], trained)


def refuse(case: Case, folder: Path) -> None:
    """Every rank ends with the message; the run is recorded as failed, and no checkpoint came or went."""
    shutil.rmtree(folder / "runs/new", ignore_errors=True)
    before = checkpoints_in(folder)
    case.write_files(folder)
    arguments = case.arguments()
    ended = run_on_ranks(folder, arguments, case.ranks)
    print(f"{ended.seconds:.1f} s\n{ended.output}")
    assert_refused(ended, case.says)
    assert checkpoints_in(folder) == before
    run = folder / arguments[arguments.index("--save_checkpoint_path") + 1]
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["state"] == "failed"
    assert case.says[0] in record["reason"]


def test_a_failure_of_another_rank_is_recorded(material: Path) -> None:
    ended = run_on_ranks(
        material, Case("--save_checkpoint_path runs/stumbled", ()).arguments(), 2, program=guarded_stumble
    )
    assert_refused(ended, ("The disk of rank 1 is gone. Look at its cable.", "(rank 1 of 2 on "))
    record = json.loads((material / "runs/stumbled/run.json").read_text(encoding="utf-8"))
    assert (record["state"], record["reason"]) == ("failed", "The disk of rank 1 is gone. Look at its cable.")


@pytest.fixture(params=["silent", "without that model"])
def hub(request: pytest.FixtureRequest) -> Iterator[str]:
    """A hub that never answers, as behind a firewall; and one that does, and has nothing."""
    if request.param == "silent":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        return
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class EmptyHub(http.server.BaseHTTPRequestHandler):
    """Knows no model."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("flag", ["--model_name", "--tokenizer_name"])
def test_an_unknown_hub_name_is_refused_soon(flag: str, hub: str, material: Path, tmp_path: Path) -> None:
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}
    ended = run_on_ranks(material, Case(f"{flag} nobody/nothing", ()).arguments(), env=env)
    print(f"{ended.seconds:.1f} s\n{ended.output}")
    assert_refused(ended, ("nobody/nothing: ", flag, "Check"))
    assert ended.seconds < LONGEST_SECONDS


def test_a_program_of_its_own_refuses_like_a_forked_rank(material: Path, tmp_path: Path) -> None:
    """As a user starts it, torch's import included, where the hub is switched on and nothing answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = rank_environment({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)})
        ended = run_train(material, Case("--model_name nobody/nothing", ()).arguments(), env)
    print(f"{ended.seconds:.1f} s\n{ended.output}")
    assert_refused(ended, ("--model_name nobody/nothing", "could not be reached", "pass a folder"))
    assert ended.seconds < LONGEST_SECONDS
