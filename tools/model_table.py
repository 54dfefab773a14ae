"""Does every causal language model of the installed transformers train? A table of all of them, from real runs at tiny size.

    python tools/model_table.py                                   # all that has no result yet; writes docs/reference/models.md
    python tools/model_table.py --types llama mixtral --again     # these alone, whatever is known of them
    python tools/model_table.py --failed                          # those that did not train, once more

For each type: a folder of random weights, made by plain transformers; two optimizer steps of two ranks with ZeRO-3 and
with FSDP2, through the whole of what train.py does (checks, loop, checkpoint); loss and gradient norm of the first step
against plain transformers, each document by itself; the export, loaded by plain transformers, against the logits of
training. A type whose documents cannot share a row is trained with `--packing off`.

Results are kept in a JSON file after each type, so that the table can be broken off and resumed. Each engine is started
once: one process group serves all types. One that ends it (a crash, a hang, an exception that is not meant for users) is
recorded as that, and the next start goes on with the rest.
"""

import argparse
import gc
import json
import math
import os
import random
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "models.md"
RESULTS = ROOT / "runs" / "model_table.json"
ENGINES = {"deepspeed": "ZeRO-3", "fsdp": "FSDP2"}
RANKS = 2
CONTEXT = 32
ROWS = 4
STEPS = 2
LEAST_SECONDS = 120
"""How long a start may take before its first type."""

TOLERANCE = {"fp32": 2e-5, "bf16": 3e-2}
"""Relative differences from plain transformers that count as equal."""

COMPOSING = "tokenizer-nfc"
"""The tokenizer of Qwen's models: transformers loads theirs with NFC, whatever its files say."""

Result = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Fill in what is missing, and write the page."""
    sys.path.insert(0, str(ROOT))
    if argv[:1] == ["--rank"]:
        return _rank(json.loads(argv[1]))
    asked = _parse(argv)
    types = asked.types or _all_types()
    results: dict[str, Result] = json.loads(asked.results.read_text()) if asked.results.exists() else {}
    for precision in asked.precision:
        for engine in ENGINES:
            run = f"{engine}/{precision}"
            missing = [name for name in types if _is_wanted(results.get(name, {}).get(run), asked)]
            for name, result in _run_types(missing, engine, precision, asked.seconds):
                results.setdefault(name, {})[run] = result
                _write_json(asked.results, results)
                print(f"{run} {name}: {_in_a_word(result)}", flush=True)
    if asked.page is not None:
        asked.page.write_text(page(results), encoding="utf-8")
        print(asked.page)
    return 0


def _all_types() -> list[str]:
    from tools.tiny_models import causal_types

    return causal_types()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="model types; by default all")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=sorted(TOLERANCE))
    parser.add_argument("--again", action="store_true", help="run those too that have a result")
    parser.add_argument("--failed", action="store_true", help="run those too that did not train")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file that results are kept in")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--seconds", type=float, default=90, help="limit of one type")
    return parser.parse_args(argv)


def _is_wanted(known: Result | None, asked: argparse.Namespace) -> bool:
    return known is None or asked.again or (asked.failed and not trains(known))


def _write_json(path: Path, results: Mapping[str, Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    beside.replace(path)


# The process that starts the ranks.


def _run_types(types: Sequence[str], engine: str, precision: str, seconds: float) -> Iterator[tuple[str, Result]]:
    """Results as they come. What ends the ranks is a result of the type that they were at."""
    left = list(types)
    while left:
        with tempfile.TemporaryDirectory(prefix="model-table-") as name:
            ranks = _Ranks(left, engine, precision, Path(name))
            try:
                while left:
                    result = ranks.next_result(seconds)
                    yield left.pop(0), result
                    if result.get("ended"):
                        break
            finally:
                ranks.end()


class _Ranks:
    """One start of an engine's ranks, which go through the types and tell the result of each."""

    def __init__(self, types: Sequence[str], engine: str, precision: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        reader, writer = os.pipe()
        request = {
            "types": list(types),
            "engine": engine,
            "precision": precision,
            "folder": str(folder),
            "pipe": writer,
        }
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--rank", json.dumps(request)]
        self._log = folder / "log.txt"
        self._is_first = True
        self._pipe, self._text = reader, b""
        with self._log.open("wb") as log:
            self._processes = [
                subprocess.Popen(
                    command, env=_environment(rank, port), stdout=log, stderr=log, pass_fds=[writer], cwd=folder
                )
                for rank in range(RANKS)
            ]
        os.close(writer)

    def next_result(self, seconds: float) -> Result:
        """What comes of the next type within its time."""
        deadline = time.monotonic() + seconds + (LEAST_SECONDS if self._is_first else 0)
        self._is_first = False
        while b"\n" not in self._text:
            ready, _, _ = select.select([self._pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return {"ended": True, "error": f"not done within {seconds:.0f} s", "log": self._tail()}
            more = os.read(self._pipe, 1 << 16)
            if not more:
                return {"ended": True, "error": "the ranks died", "log": self._tail()}
            self._text += more
        line, _, self._text = self._text.partition(b"\n")
        result: Result = json.loads(line)
        return result

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def end(self) -> None:
        os.close(self._pipe)
        for process in self._processes:
            process.kill()
            process.wait()


def _environment(rank: int, port: int) -> dict[str, str]:
    of_a_launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    local = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    alone = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, **of_a_launcher, **local, **alone, **quiet, "PYTHONPATH": str(ROOT)}


# What a rank does.


def _rank(request: Mapping[str, Any]) -> int:
    from ds_recipes.engine.create import start_world
    from ds_recipes.world.resolve import resolve

    folder = Path(request["folder"])
    place = resolve(os.environ)
    world = start_world(place, _config(folder, folder / "none", request["engine"], request["precision"], "documents"))
    if world.rank == 0:
        _make_inputs(folder)
    world.barrier("inputs")
    for name in request["types"]:
        result = _one_type(world, name, folder, request["engine"], request["precision"])
        if world.rank == 0:
            os.write(request["pipe"], json.dumps(result).encode() + b"\n")
        if result.get("ended"):
            os._exit(1)
    os._exit(0)


def _one_type(world: Any, name: str, folder: Path, engine: str, precision: str) -> Result:
    from ds_recipes.errors import DsRecipesError

    started, mine = time.monotonic(), folder / name
    result: Result = {"class": _class_name(name)}
    try:
        built = world.broadcast(_make_model(name, mine, folder) if world.rank == 0 else None)
        if built is not None:
            return result | {"not_built": built}
        try:
            result |= _train(world, folder, mine, engine, precision, "documents")
            result["packed"] = True
        except DsRecipesError as error:
            if "--packing off" not in str(error):
                raise
            result |= {"packed": False, "not_packed": str(error)}
            result |= _train(world, folder, mine, engine, precision, "off")
    except DsRecipesError as error:
        result["refused"] = str(error)
    except Exception as error:
        traceback.print_exc()  # of each rank, in the log
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
        text = f"{type(error).__name__}: {str(error)[:400]} ({where})"
        result |= {"ended": True, "error": text, "log": traceback.format_exc()[-3000:]}
    finally:
        if world.rank == 0:
            shutil.rmtree(mine, ignore_errors=True)
        gc.collect()
    return result | {"seconds": round(time.monotonic() - started, 1)}


def _class_name(name: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])


def _train(world: Any, folder: Path, mine: Path, engine: str, precision: str, packing: str) -> Result:
    """Two steps from the start's checks to the last checkpoint, and what is compared with plain transformers."""
    from ds_recipes.checkpoint.store import checkpoint_name
    from ds_recipes.training.launch import Launch
    from ds_recipes.training.loop import train
    from ds_recipes.training.run_record import RunRecord
    from ds_recipes.training.start import prepare
    from ds_recipes.training.stop import StopRequest

    out = mine / f"run-{packing}"
    config = _config(folder, mine, engine, precision, packing)
    record = RunRecord(out, config, RANKS, [], launch="table") if world.rank == 0 else None
    started = time.monotonic()
    stop = StopRequest(out, world.rank == 0, started, None)
    stop.hear(world.heard_stop)
    run = prepare(config, Launch(world, out, record, started, stop, "table", None))
    try:
        theirs = world.check(
            "plain transformers", lambda: _plain_step(mine, run, precision) if world.rank == 0 else None
        )
        status = train(run)
        assert status == 0, status
    finally:
        run.engine.close()
    checkpoint = out / checkpoint_name(STEPS)
    exported = world.check("export", lambda: _export(checkpoint, mine / f"hf-{packing}") if world.rank == 0 else None)
    if world.rank != 0:
        return {}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    first = next(line for line in lines if "loss" in line)
    loss, norm = theirs
    return {
        "losses": losses,
        "precision": precision,
        "loss_difference": abs(first["loss"] - loss) / abs(loss),
        "norm_difference": abs(first["grad_norm"] - norm) / norm,
        **exported,
    }


def _config(folder: Path, model: Path, engine: str, precision: str, packing: str) -> Any:
    from ds_recipes.config.load import load_config

    flags = {
        "model_name": model,
        "tokenizer_name": folder / (COMPOSING if model.name.startswith("qwen") else "tokenizer"),
        "dataset": "text",
        "train_data": folder / "train.jsonl",
        "context_size": CONTEXT,
        "packing": packing,
        "engine": engine,
        "precision": precision,
        "batch_size_training": 1,
        "global_batch_size": ROWS,
        "max_steps": STEPS,
        "lr": "1e-3",
        "log_interval": 1,
        "save_checkpoint_path": model / f"run-{packing}",
        "save_interval_iteration": STEPS,
    }
    return load_config([part for name, value in flags.items() for part in (f"--{name}", str(value))], env={})


def _make_inputs(folder: Path) -> None:
    """A tokenizer of bytes, and texts from shorter than a row to longer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("<s>", "</s>", "<pad>", "<unk>")
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "tokenizer")
    tokenizer.normalizer = normalizers.NFC()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / COMPOSING)
    chosen = random.Random(1)
    texts = ["".join(chosen.choices("abcdefgh ", k=chosen.choice((5, 9, 14, 30)))) for _ in range(60)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _make_model(name: str, mine: Path, folder: Path) -> str | None:
    """Random weights of a tiny model in a folder, by plain transformers; why there are none."""
    import torch
    from transformers import AutoModelForCausalLM

    from tools.tiny_models import tiny_config

    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # so that no bias or norm hides behind its initial 0 or 1
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(mine)
        loaded = AutoModelForCausalLM.from_pretrained(mine, dtype=torch.float32)
        ids = torch.arange(CONTEXT)[None] + 4
        if not loaded(input_ids=ids, use_cache=False).logits.isfinite().all():
            return "its logits are not finite at tiny size"
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {text[:200]}"
    return None


def _plain_step(mine: Path, run: Any, precision: str) -> tuple[float, float]:
    """Loss a target token and gradient norm of the first global batch in plain transformers, a document at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    from ds_recipes.data.stream import Stream

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = AutoModelForCausalLM.from_pretrained(mine, dtype=dtype).train()
    built = dict(AutoModelForCausalLM.from_config(model.config).named_parameters())
    for name, parameter in model.named_parameters():  # loading loses what the class freezes (Marian's positions)
        parameter.requires_grad_(built[name].requires_grad)
    batches = [batch for rank in range(RANKS) for batch in Stream(run.corpus, run.plan, rank).take()]
    targets = sum(batch.num_target_tokens for batch in batches)
    total = 0.0
    for batch in batches:
        for ids, wanted in _documents(batch):
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()  # [tokens, vocabulary]
            learned = wanted >= 0
            loss = torch.nn.functional.cross_entropy(logits[learned], wanted[learned], reduction="sum") / targets
            loss.backward()
            total += loss.item()
    gradients = [parameter.grad.double().norm() for parameter in model.parameters() if parameter.grad is not None]
    return total, torch.stack(gradients).norm().item()


def _documents(batch: Any) -> Iterator[tuple[Any, Any]]:
    """Ids and targets by position (-1: none) of each document with targets."""
    import torch

    targets = torch.full((batch.input_ids.numel(),), -1)
    targets[batch.target_index] = batch.target_ids
    starts = torch.nonzero(batch.position_ids.flatten() == 0).flatten().tolist()
    for start, end in pairwise([*starts, batch.input_ids.numel()]):
        if (targets[start:end] >= 0).any():
            yield batch.input_ids.flatten()[start:end], targets[start:end]


def _export(checkpoint: Path, out: Path) -> Result:
    """Export the checkpoint and load it with plain transformers: how its logits differ, relative to the largest."""
    from ds_recipes.checkpoint.export.fresh_load import compare
    from ds_recipes.checkpoint.export.wanted import Wanted
    from ds_recipes.checkpoint.export.whole import export
    from ds_recipes.checkpoint.manifest import PROBE

    made = export(checkpoint, out, Wanted(load_check=False))
    probe = str(checkpoint / PROBE)
    request = {"folder": str(out), "dtype": made.dtype, "trust_remote_code": False, "probe": probe, "tokenizer": None}
    seen = compare(request)
    others = [str(name) for kind in ("missing", "unexpected", "mismatched") for name in seen[kind]]  # type: ignore[attr-defined]
    return {"export_difference": seen["difference"] / seen["largest_logit"], "export_tensors": others}  # type: ignore[operator]


# The page.


def trains(result: Result) -> bool:
    """True for a type that trained as plain transformers does and whose export computes what was trained."""
    return "losses" in result and not wrong(result)


def wrong(result: Result) -> list[str]:
    """In which respects a run differs from what it should be."""
    found = []
    if "losses" in result:
        bound = TOLERANCE[result["precision"]]
        for key, what in (
            ("loss_difference", "loss"),
            ("norm_difference", "gradient norm"),
            ("export_difference", "export"),
        ):
            if not result[key] <= bound:
                found.append(f"{what} off by {result[key]:.1e}")
        if result["export_tensors"]:
            found.append(f"export lacks or adds {', '.join(result['export_tensors'][:2])}")
        if not all(map(math.isfinite, result["losses"])):
            found.append("loss not finite")
    return found


def _in_a_word(result: Result) -> str:
    for key, word in (("not_built", "not built"), ("refused", "refused"), ("error", "ERROR")):
        if key in result:
            return f"{word}: {result[key][:300]}"
    how = "packed" if result["packed"] else "not packed"
    return f"{how}, {'; '.join(wrong(result)) or 'equal'} ({result['loss_difference']:.0e}, {result['norm_difference']:.0e})"


def page(results: Mapping[str, Result]) -> str:
    """The table and what was refused, in Markdown."""
    import torch
    import transformers

    from tools.tiny_models import causal_types

    runs = [f"{engine}/{precision}" for precision in TOLERANCE for engine in ENGINES]
    runs = [run for run in runs if any(run in of_type for of_type in results.values())]
    built = {name: of for name, of in results.items() if not any("not_built" in result for result in of.values())}
    good = [name for name, of in built.items() if all(trains(of.get(run, {})) for run in runs if run.endswith("fp32"))]
    return "\n".join(
        [
            "# Which models train",
            "",
            f"Written by `tools/model_table.py` with transformers {transformers.__version__} and torch {torch.__version__}, on "
            f"CPUs. transformers knows {len(causal_types())} types of causal language models. Of the {len(results)} that were run "
            f"here {len(built)} build at tiny size, and **{len(good)} train with ZeRO-3 and with FSDP2**.",
            "",
            "Each is a model of random weights with every kind of layer of its type: two optimizer steps of two ranks through "
            "all that train.py does. *Loss* and *norm*: the first step's loss and gradient norm against plain transformers, "
            "each document by itself; *export*: the exported model's logits against those of training; each the largest "
            "relative difference of the runs in float32. *Packed*: documents may share a row; where it says no, train with "
            "`--packing off`.",
            "",
            f"| type | class | {' | '.join(map(_heading, runs))} | packed | loss | norm | export |",
            "|---" * (len(runs) + 6) + "|",
            *(
                _row(name, results[name], runs)
                for name in sorted(built)
                if any("losses" in of for of in built[name].values())
            ),
            "",
            "## Refused, or not right",
            "",
            *(line for name in sorted(built) for line in _problems(name, built[name], runs)),
            "",
            "## Not built at tiny size",
            "",
            *(f"- `{name}`: {_first(results[name], 'not_built')}" for name in sorted(results) if name not in built),
            "",
        ]
    )


def _heading(run: str) -> str:
    engine, precision = run.split("/")
    return ENGINES[engine] + ("" if precision == "fp32" else f" {precision}")


def _row(name: str, of_type: Mapping[str, Result], runs: Sequence[str]) -> str:
    cells = ["–" if run not in of_type else "yes" if trains(of_type[run]) else "no" for run in runs]
    packed = "yes" if all(result.get("packed", True) for result in of_type.values()) else "no"
    worst = [
        max((of[key] for run, of in of_type.items() if key in of and run.endswith("fp32")), default=math.nan)
        for key in ("loss_difference", "norm_difference", "export_difference")
    ]
    return f"| {name} | {_class_name(name)} | {' | '.join(cells)} | {packed} | {' | '.join(f'{value:.0e}' for value in worst)} |"


def _problems(name: str, of_type: Mapping[str, Result], runs: Sequence[str]) -> list[str]:
    """One line a text, with the runs that it is of."""
    texts: dict[str, list[str]] = {}
    for run in runs:
        result = of_type.get(run, {})
        text = result.get("refused") or result.get("error") or "; ".join(wrong(result))
        if text:
            texts.setdefault(" ".join(text.split()), []).append(_heading(run))
    return [f"- `{name}` ({', '.join(where)}): {text}" for text, where in texts.items()]


def _first(of_type: Mapping[str, Result], key: str) -> str:
    return str(next(result[key] for result in of_type.values() if key in result))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
