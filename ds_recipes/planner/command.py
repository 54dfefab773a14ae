"""The command line of tools/plan.py: its own flags beside those of train.py."""

import argparse
import json
from collections.abc import Sequence

from rich.console import Console

from ds_recipes.config.load import load_config
from ds_recipes.config.schema import Config
from ds_recipes.errors import ConfigError
from ds_recipes.planner.find import find_architecture
from ds_recipes.planner.machine import GPUS, memory_bytes
from ds_recipes.planner.plan import Question, answer
from ds_recipes.planner.show import TABLE_HEAD, show, table_row

DOES_NOT_FIT = 1

STAND_INS = {"train_data": "data.jsonl", "tokenizer_name": "tokenizer", "save_checkpoint_path": "run"}
"""Settings that a run must have and a plan does not read."""


def run(argv: Sequence[str], description: str) -> int:
    """Plan the run and print it. Returns 0 if it fits and 1 if it does not.

    Raises:
        ConfigError, InputError: wrong settings, or a model that cannot be read.
    """
    own, settings = _parser(description).parse_known_args(list(argv))
    question = _question(own)
    configs = [own.model_configs] if own.model_configs else [[None]]
    answers = []
    for path in configs[0]:
        config = load_config([*settings, *(("--model_config", path) if path else ())], stand_ins=STAND_INS)
        answers.append(answer(config, find_architecture(config), _at_peak(question, config, own)))
    if own.json:
        documents = [one.to_json() for one in answers]
        print(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
    elif own.table:
        print("\n".join([TABLE_HEAD, *map(table_row, answers)]))
    else:
        console = Console(soft_wrap=True, highlight=False)
        for one in answers:
            show(console, one)
    return 0 if all(one.fits for one in answers) else DOES_NOT_FIT


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nodes", type=_whole, default=1, help="hosts (default 1)")
    parser.add_argument("--gpus_per_node", type=_whole, default=8, help="GPUs of a host (default 8)")
    parser.add_argument("--gpu_memory", help="such as 80GB (10^9 bytes) or 79.6GiB; default: that of --gpu")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="H100", help="for memory and peak (default H100)")
    parser.add_argument("--gpu_tflops", type=_positive, help="peak of one GPU, instead of --gpu's")
    parser.add_argument("--mfu", type=_positive, default=0.4, help="share of the peak that is reached (default 0.4)")
    parser.add_argument("--price_per_gpu_hour", type=_positive, help="in any currency")
    parser.add_argument(
        "--epoch_tokens", type=_whole, help="tokens of the training data, if it is not there to be read"
    )
    parser.add_argument("--model_configs", nargs="+", metavar="JSON", help="plan several models with the same settings")
    parser.add_argument("--json", action="store_true", help="numbers in bytes and seconds, for programs")
    parser.add_argument("--table", action="store_true", help="a row for each model, in Markdown")
    return parser


def _whole(text: str) -> int:
    number = int(text.replace("_", ""))
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return number


def _question(own: argparse.Namespace) -> Question:
    if own.mfu > 1:
        raise ConfigError([f"--mfu is a share of the peak, so at most 1, not {own.mfu:g} (command line)"])
    gpu = GPUS[own.gpu]
    return Question(
        nodes=own.nodes,
        gpus_per_node=own.gpus_per_node,
        memory_bytes=gpu.memory_bytes if own.gpu_memory is None else memory_bytes(own.gpu_memory),
        peak_tflops=own.gpu_tflops or gpu.half_tflops,
        mfu=own.mfu,
        gpu="" if own.gpu_tflops else own.gpu,
        price_per_gpu_hour=own.price_per_gpu_hour,
        epoch_tokens=own.epoch_tokens,
    )


def _at_peak(question: Question, config: Config, own: argparse.Namespace) -> Question:
    """Float32 has another peak."""
    if config.run.precision != "fp32" or own.gpu_tflops:
        return question
    return Question(**{**vars(question), "peak_tflops": GPUS[own.gpu].float32_tflops})
