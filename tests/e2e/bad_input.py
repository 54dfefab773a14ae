"""What the tests of refusals share: tiny inputs, the real `train.py` on real ranks, and what a refusal looks like."""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ds_recipes.config.load import load_config
from ds_recipes.errors import InputError
from ds_recipes.world.resolve import resolve
from tests.ranks.launch import fork_rank, rank_environment, wait_for

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
"""Time limit of one launch; most take one or two."""

REFUSED = 2
LONGEST_REFUSAL = 12  # lines, two of them the table of ranks
TEXTS = [f"The {noun} {verb} over the river." for noun in ("fox", "heron", "train") for verb in ("jumps", "flies")]

NEEDED = {
    "--model_name": "./model",
    "--train_data": "train.jsonl",
    "--save_checkpoint_path": "runs/new",
    "--context_size": "32",
    "--precision": "fp32",
    "--max_steps": "1",
}
"""A command line on which training succeeds; a case changes it in one place."""


@dataclass(frozen=True)
class Case:
    """Flags that must be refused, and what the message must hold; the first of `says` must stand there exactly once.

    `flags` replace those of NEEDED; `without` names flags that are left out; `files` are written first.
    """

    flags: str
    says: tuple[str, ...]
    ranks: int = 1
    without: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        mine = self.flags.split()
        kept = [(name, value) for name, value in NEEDED.items() if name not in (*mine, *self.without)]
        return [*(word for pair in kept for word in pair), *mine]

    def write_files(self, folder: Path) -> None:
        for name, text in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Ended:
    """How a launch ended: the status of every rank and what all of them wrote, in the order of the ranks."""

    statuses: list[int | None]
    output: str
    seconds: float


def assert_refused(ended: Ended, says: Sequence[str]) -> None:
    """Status 2 on every rank, and one short message that holds all of `says`, shown once, without a traceback."""
    report = f"statuses {ended.statuses} after {ended.seconds:.1f} s, output:\n{ended.output}"
    assert set(ended.statuses) == {REFUSED}, report
    for text in says:
        assert text in ended.output, f"{text!r} is missing; {report}"
    assert ended.output.count(says[0]) == 1, report
    lines = [line for line in ended.output.splitlines() if line.strip()]
    assert len(lines) == len(set(lines)), f"a line is shown twice; {report}"
    assert len(lines) <= LONGEST_REFUSAL, report
    for word in ("Traceback", 'File "', "Error:", "Warning:", "[rank"):
        assert word not in ended.output, report


def write_material(folder: Path) -> None:
    """A model of two layers with its tokenizer, the same tokenizer without EOS, one with too many tokens, and data."""
    write_tokenizer(folder / "model", TEXTS, 300)
    write_tokenizer(folder / "tokenizer_without_eos", TEXTS, 300, eos_token=None)
    write_tokenizer(folder / "tokenizer_too_large", [*TEXTS, *("aardvark zymurgy quixotic" for _ in range(9))], 400)
    write_model(folder / "model", hidden_size=32)
    shutil.copytree(folder / "model", folder / "wider")
    write_model(folder / "wider", hidden_size=64)
    write_records(folder / "train.jsonl", *({"text": text} for text in TEXTS * 4))
    shutil.copytree(ROOT / "ds_configs", folder / "ds_configs")


def write_records(path: Path, *records: Mapping[str, object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_tokenizer(folder: Path, texts: Sequence[str], size: int, eos_token: str | None = "</s>") -> None:
    """Train a byte-level BPE tokenizer of at most `size` tokens and save it as transformers reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos_token}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_model(folder: Path, hidden_size: int) -> None:
    """Save a Llama-shaped model of two layers, 300 tokens and 64 positions with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def damage(run: Path) -> None:
    """Cut the weights of every checkpoint of a run short by one byte."""
    for checkpoint in run.glob("iter_*"):
        largest = max(checkpoint.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        with largest.open("r+b") as file:
            file.truncate(largest.stat().st_size - 1)


def checkpoints_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("runs/*/iter_*")}


def run_train(folder: Path, arguments: Sequence[str], env: Mapping[str, str], timeout: float = SECONDS) -> Ended:
    """`python train.py ARGUMENTS` as a user starts it."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ended([done.returncode], done.stdout, time.monotonic() - started)


def guarded_train(arguments: Sequence[str], folder: Path) -> int:
    """What `train.py` does when it is started as a program."""
    import train

    return guarded(train.main, arguments, folder)


def guarded(main: Callable[[Sequence[str]], int], arguments: Sequence[str], folder: Path) -> int:
    os.chdir(folder)
    from huggingface_hub import constants

    from ds_recipes.world.failure import run_guarded

    importlib.reload(constants)  # they were read from the environment of the server that this process is forked from

    return run_guarded(main, arguments)


def guarded_stumble(arguments: Sequence[str], folder: Path) -> int:
    """A launch in which rank 1 fails while the others wait for it."""
    return guarded(stumble, arguments, folder)


def stumble(arguments: Sequence[str]) -> int:
    from ds_recipes.training.launch import open_launch

    with open_launch(load_config(arguments), resolve(os.environ), time.monotonic()) as launch:
        if launch.world.rank == 1:
            raise InputError("The disk of rank 1 is gone. Look at its cable.")
        launch.world.barrier("a meeting")
    return 0


def run_on_ranks(
    folder: Path,
    arguments: Sequence[str],
    ranks: int = 1,
    env: Mapping[str, str] | None = None,
    program: Callable[[Sequence[str], Path], int] = guarded_train,
) -> Ended:
    """`train.py`, or another program, on ranks forked after torch has been imported, with a launcher's variables."""
    started = time.monotonic()
    port = free_port()
    outputs = [folder / f"output-{port}-{rank}.txt" for rank in range(ranks)]
    processes = [
        fork_rank(program, (arguments, folder), output, {**launcher_variables(rank, ranks, port), **(env or {})})
        for rank, output in enumerate(outputs)
    ]
    in_time = wait_for(processes, SECONDS)
    text = "".join(output.read_text(encoding="utf-8") for output in outputs)
    statuses = [process.exitcode for process in processes]
    return Ended(statuses, text if in_time else f"{text}\n(a rank had to be killed)", time.monotonic() - started)


def launcher_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Nothing for a single process; else what a launcher sets that lets rank 0 serve the store."""
    if ranks == 1:
        return {}
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    numbers = map(str, (rank, rank, ranks, ranks, port))
    return {"MASTER_ADDR": "127.0.0.1", **dict(zip(names, numbers, strict=True))}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def trap_for_torch(folder: Path) -> dict[str, str]:
    """An environment in which importing torch, DeepSpeed, transformers or numpy raises."""
    for name in ("torch", "deepspeed", "transformers", "numpy"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError(f'{__name__} was imported')\n")
    return rank_environment({"PYTHONPATH": str(folder)})
