"""torch's own watch over NCCL, as the hang monitor sets it up and reads it."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.world.hang.nccl import PREFIX, prepare_nccl
from tests.e2e.launchers import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use"),
]

PROGRAM = """
import sys
from pathlib import Path

import torch
from torch import distributed

from ds_recipes.world.hang.nccl import write_flight_record

store = distributed.HashStore()
distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
ones = torch.ones(8, device="cuda")
for _ in range(3):
    distributed.all_reduce(ones)
torch.cuda.synchronize()
write_flight_record(Path(sys.argv[1]), 0)
distributed.destroy_process_group()
"""


def test_the_flight_recorder_remembers_collectives(tmp_path: Path) -> None:
    env = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    prepare_nccl(env, tmp_path, 60.0)
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], env=env, check=True, timeout=120)
    record: dict[str, Any] = pickle.loads((tmp_path / f"{PREFIX}0").read_bytes())
    assert sum("all_reduce" in entry["profiling_name"] for entry in record["entries"]) == 3
