"""A model from the hub, by its id: a local server speaks the hub's own protocol, and huggingface_hub asks it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.launchers import ROOT, command, run
from tests.hub_server import COMMIT, HubHandler, etag, served
from tests.nano import make_nano
from tests.ranks.training import metrics

MODEL_ID = "someone/nano"


class Hub(HubHandler):
    """Serves one folder as one model: its description, its list of files, and the files with size and ETag."""

    folder: Path

    def answer(self, path: str, with_body: bool) -> None:
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        name = path.rpartition("/")[2]
        if path == "/":
            self.send(b"", with_body)
        elif path.startswith(f"/api/models/{MODEL_ID}/tree/"):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": etag(d)} for n, d in files.items()]
            self.send(json.dumps(tree).encode(), with_body)
        elif path.startswith(f"/api/models/{MODEL_ID}"):
            siblings = [{"rfilename": n} for n in files]
            self.send(json.dumps({"id": MODEL_ID, "sha": COMMIT, "siblings": siblings}).encode(), with_body)
        elif path.startswith(f"/{MODEL_ID}/resolve/") and name in files:
            self.send_file(files[name], with_body)
        else:
            self.send_nothing(with_body, "EntryNotFound")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def hub(nano: Path, tmp_path: Path) -> Iterator[str]:
    """The model's folder has moved to the hub, together with a copy of the weights that nobody needs."""
    Hub.folder = tmp_path / "on_the_hub"
    shutil.copytree(nano.parent / "model", Hub.folder)
    (Hub.folder / "consolidated.safetensors").write_bytes(b"the same again")
    with served(Hub) as address:
        yield address


@pytest.mark.slow
def test_a_hub_id_trains_as_its_folder_does_and_later_without_the_hub(nano: Path, hub: str, tmp_path: Path) -> None:
    def losses(name: str, model: str, env: dict[str, str]) -> list[float]:
        folder = tmp_path / name
        flags = ["--model_name", model, "--save_checkpoint_path", str(folder), "--max_steps", "2"]
        ended = run(command("torchrun", 2, ROOT / "train.py", "--config", str(nano), *flags), env=env)
        assert ended.status == 0, ended.output
        return [line["loss"] for line in metrics(folder).values()]

    cache = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    from_folder = losses("folder", str(nano.parent / "model"), {})
    assert losses("hub", MODEL_ID, cache | {"HF_HUB_OFFLINE": "0"}) == from_folder
    gets = [asked for asked in Hub.asked if asked.startswith("GET")]
    assert sum("model.safetensors" in asked for asked in gets) == 1, "one rank of a host downloads the weights, once"
    assert not any("consolidated" in asked for asked in gets)
    seen = len(Hub.asked)
    assert losses("offline", MODEL_ID, cache | {"HF_HUB_OFFLINE": "1"}) == from_folder
    assert len(Hub.asked) == seen
